// Plain C++, for every CPU: compilers turn the small inner loops into vectors of the machine.
#include "kernels.h"
#include "order/magnitude_key.h"
#include "vectors.h"

namespace gmp::cpu {
namespace {

#include "arithmetic.h"
#include "lanes_portable.h"

template <typename Key>
using Lanes = PlainLanes<Key>;

// The order of these matters.
#include "kernels_impl.h"
#define GMP_RULE_FUNCTIONS
#include "optim/update_rule.h"
#include "update_impl.h"

}  // namespace

const KernelSet kPortableKernels = kernel_set("portable");

}  // namespace gmp::cpu
