// AVX-512 (F, BW, VL, DQ, VBMI2: Ice Lake and Zen 4 onwards). Compiled with its own flags; see kernels_impl.h.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernels.h"
#include "order/magnitude_key.h"
#include "vectors.h"

namespace gmp::cpu {
namespace {

#include "lanes_avx512.h"
// Order matters.
#include "arithmetic_avx.h"
#include "kernels_impl.h"
#include "update_impl.h"

}  // namespace

const KernelSet kAvx512Kernels = kernel_set("avx512");

}  // namespace gmp::cpu
#endif
