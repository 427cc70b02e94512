// The weights of one filter (see order/memory_order.h) whose key is in a bracket.
#pragma once

#include <cstring>

#include "layers.h"
#include "order/magnitude_key.h"
#include "search/bracket.h"

namespace gmp::cpu {

// Calls visit(is_match, channels, positions): is_match(place in memory) says whether the key there is in the bracket
// and the bit in `mask` (nullptr: all bits) is 1.
template <typename Visit>
auto with_matches(const LayerView& layer, const uint8_t* mask, const Bracket& bracket, Visit visit) {
  return with_dtype(layer.dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    const Key lo = static_cast<Key>(bracket.lo), width = static_cast<Key>(bracket.hi - bracket.lo);
    const char* const weights = static_cast<const char*>(layer.weights);
    const auto is_match = [=](int64_t place) {
      Key raw;
      std::memcpy(&raw, weights + place * static_cast<int64_t>(sizeof(Key)), sizeof(Key));
      if (static_cast<Key>(magnitude_key(raw, infinity) - lo) > width) return false;
      return mask == nullptr || (mask[place / 8] >> (place % 8) & 1) != 0;
    };
    return visit(is_match, layer.filter.channels, layer.filter.positions);
  });
}

}  // namespace gmp::cpu
