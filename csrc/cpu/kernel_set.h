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
#include "patterns_impl.h"
// clang-format on

template <DType kDType>
constexpr Kernels kernels_for(const char* name) {
  return {name,
          count_bits,
          scan<kDType>,
          find<kDType>,
          apply<kDType>,
          apply<kDType, false>,
          protect<kDType>,
          score<kDType>,
          pack<KeyOf<kDType>>,
          unpack<KeyOf<kDType>>,
          {
#define GMP_RULE(name, fewest, most) update<Rule::name, kDType>,
              GMP_RULES(GMP_RULE)
#undef GMP_RULE
          },
          sum_squares<kDType>};
}

constexpr KernelSet kernel_set(const char* name) {
  return {
#define GMP_DTYPE(dtype, key, infinity) kernels_for<DType::dtype>(name),
      GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  };
}

}  // namespace

const KernelSet GMP_KERNELS = kernel_set(GMP_NAME);

}  // namespace gmp::cpu
