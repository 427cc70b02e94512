// The CUDA sources as they are, compiled for the host. GCC does not see that whole chunks are counted only where the
// first of them has been loaded; zeros that nobody reads would cost instructions on a GPU.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "../cuda/launchers.cu"

#include "../cuda/patterns.cu"
#include "../cuda/steps.cu"
