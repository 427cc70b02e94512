// Samples for selections that are made elsewhere.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

namespace gmp::cpu {

// Writes the keys of the unpruned weights in a sample of each group (first layer, number of layers, weights wanted) to
// a row of `keys`, whose `row_size` keys have room for all wanted and kGatherSlackBytes more, and fills the row up with
// the key of NaN. Returns per group how many these are, and how many of its sampled weights are pruned. Throws
// std::invalid_argument where the groups are not of these layers, differ in the bytes of a key, or do not fit.
std::vector<std::pair<int64_t, int64_t>> draw(const std::vector<LayerView>& layers,
                                              const std::vector<std::tuple<size_t, size_t, int64_t>>& groups,
                                              void* keys, int64_t row_size, int num_threads);

}  // namespace gmp::cpu
