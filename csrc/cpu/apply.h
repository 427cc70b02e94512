// Writing what a selection decided, and enforcing masks.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "kernels.h"
#include "select.h"

namespace gmp::cpu {

// Where one layer is cut: weights of magnitude < value are pruned, and those of magnitude == value at index >= cut.
struct Cut {
  double value;
  int64_t index;
};

// One pass over all layers: zeroes the pruned weights, writes the bits of the kept ones to kept[i] (which may be
// layers[i].mask; nullptr: not wanted), and counts. An empty `cuts` only enforces the masks.
std::vector<ApplyCounts> apply(DType dtype, const std::vector<LayerView>& layers, const std::vector<Cut>& cuts,
                               const std::vector<uint8_t*>& kept, int num_threads);

}  // namespace gmp::cpu
