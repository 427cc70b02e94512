// Weights of one key, counted between flat indices.
#pragma once

#include <vector>

#include "layers.h"

namespace gmp::cpu {

// Counts the unpruned weights of keys[l] of each layer in slots of its flat index, which is row-major: slot s is
// [places[s], places[s + 1]). `places` has a row of num_slots + 1 per layer, ascending and within it; `counts` a row of
// num_slots, to which the counts are added. Reads only the weights between the first place and the last.
void count_slots(const std::vector<LayerView>& layers, const std::vector<uint64_t>& keys, const int64_t* places,
                 int64_t num_slots, int64_t* counts, int num_threads);

}  // namespace gmp::cpu
