// AVX-512 (F, BW, VL, DQ, VBMI2: Ice Lake and Zen 4 onwards). Compiled with its own flags; see kernels_impl.h.
#if defined(__x86_64__)
#include "kernels.h"
#include "order/magnitude_key.h"
#include "vectors.h"

namespace gmp::cpu {
namespace {

#include "arithmetic.h"
#include "lanes_portable.h"
// Lanes fall back to the plain ones.
#include "lanes_avx512.h"
// The order of these matters.
#include "kernels_impl.h"
#define GMP_RULE_FUNCTIONS
#include "optim/update_rule.h"
#include "update_impl.h"

}  // namespace

const KernelSet kAvx512Kernels = kernel_set("avx512");

}  // namespace gmp::cpu
#endif
