// Small exact selections that use only the scan kernel: quickselect whose pivot is the middle of the key range.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace gmp::cpu {

// Narrows a bracket that holds all of n keys to the one of rank `rank` (0-based, ascending), and counts them relative
// to that. `spare` and `other` have room for `room` keys plus the gather slack each; `keys` may be `other`. Each step
// halves the key range, so the work is bounded by the bits of a key times n, and is about 3 n when the keys spread over
// their range.
template <typename Key>
BracketCounts order_statistic(DType dtype, Key* keys, int64_t n, int64_t rank, Bracket& bracket, Key* spare, Key* other,
                              int64_t room) {
  constexpr int64_t kSmall = 48;
  const Kernels& kernels = kernels_of(dtype);
  auto& [lo, hi] = bracket;
  int64_t below = 0, inside = n;  // of all keys
  while (lo < hi && inside > kSmall) {
    // Keys that fit are copied, and then there are no others.
    Key* const copies = inside <= room ? spare : nullptr;
    const LayerView all{dtype, keys, n, nullptr};
    const uint64_t middle = lo + (hi - lo) / 2;
    const int64_t lower = kernels.scan(all, 0, n, {lo, middle}, copies).inside;
    if (rank - below < lower) {
      hi = middle;
      inside = lower;
    } else {
      lo = middle + 1;
      below += lower;
      inside -= lower;
      if (copies != nullptr) inside = kernels.scan(all, 0, n, {lo, hi}, copies).inside;
    }
    if (copies == nullptr) continue;
    keys = copies;
    n = inside;
    std::swap(spare, other);
  }
  if (lo == hi) return {below, inside, 0};
  Key small[kSmall + kGatherSlackBytes / sizeof(Key)];
  const int64_t left = kernels.scan({dtype, keys, n, nullptr}, 0, n, bracket, small).inside;
  std::nth_element(small, small + (rank - below), small + left);
  lo = hi = small[rank - below];
  const BracketCounts counts = kernels.scan({dtype, small, left, nullptr}, 0, left, bracket, nullptr);
  return {below + counts.below, counts.inside, 0};
}

}  // namespace gmp::cpu
