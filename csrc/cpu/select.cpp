#include "select.h"

#include "selector.h"

namespace gmp::cpu {

std::vector<Selection> select(DType dtype, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune,
                              const std::vector<std::optional<Threshold>>& hints, int num_threads) {
  switch (dtype) {
#define GMP_DTYPE(name, key, infinity) \
  case DType::name:                    \
    return Selector<key>(infinity, layers, num_prune, hints, num_threads).run();
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
  __builtin_unreachable();
}

}  // namespace gmp::cpu
