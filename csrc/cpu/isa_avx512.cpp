// AVX-512 (F, BW, VL, DQ: Skylake and Cascade Lake servers).
#if defined(__x86_64__)
#include <immintrin.h>

#define GMP_LANES_HEADER "lanes_avx512.h"
#define GMP_KERNELS kAvx512Kernels
#define GMP_NAME "avx512"
#include "kernel_set.h"
#endif
