// Plain C++, for every CPU: compilers turn the small inner loops into vectors of the machine.
#define GMP_KERNELS kPortableKernels
#define GMP_NAME "portable"
#include "kernel_set.h"
