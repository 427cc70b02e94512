// AVX2 with F16C. Compiled with its own flags; see kernels_impl.h.
#if defined(__x86_64__)
#include "kernels.h"
#include "order/magnitude_key.h"
#include "vectors.h"

namespace gmp::cpu {
namespace {

#include "arithmetic.h"
#include "lanes_portable.h"
// Lanes fall back to the plain ones.
#include "lanes_avx2.h"
// The order of these matters.
#include "kernels_impl.h"
#define GMP_RULE_FUNCTIONS
#include "optim/update_rule.h"
#include "update_impl.h"

}  // namespace

const KernelSet kAvx2Kernels = kernel_set("avx2");

}  // namespace gmp::cpu
#endif
