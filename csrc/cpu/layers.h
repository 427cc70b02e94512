// A layer as every loop gets it.
#pragma once

#include <cstdint>

#include "order/dtypes.h"

namespace gmp::cpu {

struct LayerView {
  void* weights;        // any alignment
  int64_t n;            // > 0
  const uint8_t* mask;  // packed bits, or nullptr: nothing pruned yet
};

}  // namespace gmp::cpu
