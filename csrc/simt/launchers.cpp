// The CUDA sources as they are, compiled for the host.
#include "../cuda/launchers.cu"

#include "../cuda/steps.cu"
