// The kernels of one instruction set. Its file sets macros and includes this: GMP_KERNELS, the variable to define;
// GMP_NAME; and GMP_LANES_HEADER, with its registers of keys, if it has any. It is compiled with its own flags, which
// are in setup.py.
#include <cstring>

#include "kernels.h"
#include "order/magnitude_key.h"

namespace gmp::cpu {
namespace {

// clang-format off: each of these builds on those before.
#include "vectors.h"
#include "arithmetic.h"
#include "lanes_portable.h"
#if defined(GMP_LANES_HEADER)
#include GMP_LANES_HEADER
#else
template <typename Key>
using Lanes = PlainLanes<Key>;
#endif
#include "kernels_impl.h"
#define GMP_RULE_FUNCTIONS
#include "optim/update_rule.h"
#include "update_impl.h"
// clang-format on

}  // namespace

const KernelSet GMP_KERNELS = kernel_set(GMP_NAME);

}  // namespace gmp::cpu
