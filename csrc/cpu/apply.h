// Writing what a selection decided, and enforcing masks.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "layers.h"

namespace gmp::cpu {

// Zeroes the pruned weights of layers, writes the bits of the kept ones to kept[i] (which may be layers[i].mask), and
// returns how many each layer kept before, and keeps now. Pruned are the keys below keys[i], and of those equal to it
// the ones from index tie_indices[i] on. `keys`, `tie_indices` and `kept` are empty where masks are enforced and no
// more. Once the first weight is written, nothing can fail.
std::pair<std::vector<int64_t>, std::vector<int64_t>> apply(const std::vector<LayerView>& layers,
                                                            const std::vector<uint64_t>& keys,
                                                            const std::vector<int64_t>& tie_indices,
                                                            const std::vector<uint8_t*>& kept, int num_threads);

}  // namespace gmp::cpu
