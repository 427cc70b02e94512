// NEON, which every CPU of aarch64 has.
#if defined(__aarch64__)
#include <arm_neon.h>

#define GMP_NEON
#define GMP_LANES_HEADER "lanes_neon.h"
#define GMP_KERNELS kNeonKernels
#define GMP_NAME "neon"
#include "kernel_set.h"
#endif
