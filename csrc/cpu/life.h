// A look at a few pruned weights, spread over a layer, that finds writes which leave no other trace.
#pragma once

#include <algorithm>
#include <cstring>

#include "layers.h"

namespace gmp::cpu {

inline constexpr int64_t kBytesLookedAt = 128;   // of the mask
inline constexpr int64_t kWeightsLookedAt = 32;  // about so many of those that they prune

// Calls visit(place) for each pruned weight of the bytes `first`, `first + stride`, ... of the mask, until it returns
// true; returns whether it has.
template <typename Visit>
bool any_pruned(const LayerView& layer, int64_t first, int64_t stride, Visit visit) {
  for (int64_t byte = first; byte < (layer.n + 7) / 8; byte += stride) {
    for (unsigned pruned = static_cast<uint8_t>(~layer.mask[byte]); pruned != 0; pruned &= pruned - 1) {
      const int64_t place = 8 * byte + __builtin_ctz(pruned);
      if (place < layer.n && visit(place)) return true;
    }
  }
  return false;
}

// Returns whether a pruned weight of the sample is not zero. Each `turn` takes another sample.
inline bool sees_life(const LayerView& layer, int64_t turn) {
  // Strides are odd, so that in a layer of 2^n columns a sample does not stay in one column.
  const int64_t stride = (layer.n + 7) / 8 / kBytesLookedAt | 1, first = turn % stride;
  int64_t num_pruned = 0;
  any_pruned(layer, first, stride, [&](int64_t) { return ++num_pruned, false; });
  const int64_t step = num_pruned / kWeightsLookedAt | 1;
  return with_dtype(layer.dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    int64_t next = 0;
    return any_pruned(layer, first, stride, [&](int64_t place) {
      if (next++ % step != 0) return false;
      Key bits;
      std::memcpy(&bits, static_cast<const Key*>(layer.weights) + place, sizeof(Key));
      return static_cast<Key>(bits << 1) != 0;  // without the sign
    });
  });
}

}  // namespace gmp::cpu
