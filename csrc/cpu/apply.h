// Applies a selection to weights and masks, and enforces masks.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "layers.h"

namespace gmp::cpu {

// Zeroes the pruned weights of layers, writes the bits of the kept ones to kept[i] (which may be layers[i].mask), and
// returns how many each layer kept before, and keeps now. It prunes keys below keys[i], and keys equal to it from the
// row-major index tie_indices[i] on. `keys`, `tie_indices` and `kept` are empty if masks are only enforced. Once the
// first weight is written, nothing can fail.
std::pair<std::vector<int64_t>, std::vector<int64_t>> apply(const std::vector<LayerView>& layers,
                                                            const std::vector<uint64_t>& keys,
                                                            const std::vector<int64_t>& tie_indices,
                                                            const std::vector<uint8_t*>& kept, int num_threads);

}  // namespace gmp::cpu
