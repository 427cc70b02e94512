// AVX-512 with VBMI2 (Ice Lake and Zen 4 onwards).
#if defined(__x86_64__)
#include <immintrin.h>

#define GMP_LANES_HEADER "lanes_avx512.h"
#define GMP_KERNELS kAvx512Vbmi2Kernels
#define GMP_NAME "avx512_vbmi2"
#include "kernel_set.h"
#endif
