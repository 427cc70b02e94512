// AVX2 with F16C and FMA (Haswell and Zen onwards).
#if defined(__x86_64__)
#include <immintrin.h>

#define GMP_LANES_HEADER "lanes_avx2.h"
#define GMP_KERNELS kAvx2Kernels
#define GMP_NAME "avx2"
#include "kernel_set.h"
#endif
