// Walks a block of a layer in row-major order (see order/memory_order.h).
#pragma once

#include <cstring>

#include "layers.h"
#include "order/magnitude_key.h"
#include "search/bracket.h"

namespace gmp::cpu {

// Calls visit(index in row-major order, index in memory) for the weights of the block that begins at `begin`, in
// row-major order, if their key is in the bracket and their bit in `mask` (nullptr: all bits) is 1.
template <typename Visit>
void for_each_in_block(const LayerView& layer, const uint8_t* mask, int64_t begin, const Bracket& bracket,
                       Visit visit) {
  with_dtype(layer.dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    const auto [channels, positions] = layer.block;
    for (int64_t c = 0, index = begin; c < channels; ++c) {
      for (int64_t p = 0; p < positions; ++p, ++index) {
        const int64_t place = begin + p * channels + c;
        Key raw;
        std::memcpy(&raw, static_cast<const Key*>(layer.weights) + place, sizeof(Key));
        const uint64_t key = magnitude_key(raw, infinity);
        const bool kept = mask == nullptr || (mask[place / 8] >> (place % 8) & 1);
        if (kept && bracket.lo <= key && key <= bracket.hi) visit(index, place);
      }
    }
  });
}

}  // namespace gmp::cpu
