// Small exact selections made of the scan kernel alone: quickselect whose pivot is the middle of the key range.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "layers.h"

namespace gmp::cpu {

// The key of rank `rank` (0-based, ascending) among n keys that all lie in [lo, hi]. `spare` and `other` need room for
// n keys plus the gather slack each; `keys` may be `other`. Each step halves the key range, so the work is bounded by
// the bits of a key times n, and is about 3 n when the keys spread over their range.
template <typename Key>
Key order_statistic(const Key* keys, int64_t n, int64_t rank, Key lo, Key hi, Key infinity, Key* spare, Key* other) {
  constexpr int64_t kSmall = 48;
  const Kernels<Key>& kernels = kernels_for<Key>();
  while (lo < hi && n > kSmall) {
    const Key middle = static_cast<Key>(lo + (hi - lo) / 2);
    const int64_t lower = kernels.scan(keys, n, nullptr, infinity, lo, middle, spare).inside;
    if (rank < lower) {
      hi = middle;
      n = lower;
    } else {
      lo = static_cast<Key>(middle + 1);
      n = kernels.scan(keys, n, nullptr, infinity, lo, hi, spare).inside;
      rank -= lower;
    }
    keys = spare;
    std::swap(spare, other);
  }
  if (lo == hi) return lo;
  Key small[kSmall];
  std::copy_n(keys, n, small);
  std::nth_element(small, small + rank, small + n);
  return small[rank];
}

// Keys of which `below` smaller ones have been left out; all lie in [lo, hi].
template <typename Key>
struct Narrowed {
  const Key* keys;
  int64_t n, below;
  Key lo, hi;
};

// Those keys around the ranks [low, high] (clamped to what there is) that a small sample of the keys themselves points
// to, copied to `spare`; all of them where the small sample misses, or is not worth taking.
template <typename Key>
Narrowed<Key> narrow(const Key* keys, int64_t n, int64_t low, int64_t high, Key infinity, Key* spare) {
  constexpr int64_t kSmall = 1024, kMargin = 96;  // six standard deviations of a rank among 1024
  const Key largest = static_cast<Key>(infinity + 1);
  const Narrowed<Key> all{keys, n, 0, 0, largest};
  if (n < 16 * kSmall) return all;
  Key small[kSmall];
  for (int64_t i = 0; i < kSmall; ++i) small[i] = keys[i * n / kSmall];
  std::sort(small, small + kSmall);
  const int64_t first = low * kSmall / n - kMargin, last = high * kSmall / n + kMargin;
  const Key lo = first < 0 ? Key{0} : small[first];
  const Key hi = last >= kSmall ? largest : small[last];
  const ScanCounts<Key> counts = kernels_for<Key>().scan(keys, n, nullptr, infinity, lo, hi, spare);
  const bool holds = counts.below <= std::max<int64_t>(low, 0) && std::min(high, n - 1) < counts.below + counts.inside;
  return holds ? Narrowed<Key>{spare, counts.inside, counts.below, lo, hi} : all;
}

// Flat index of the match number `rank` (0-based) among the unpruned keys in [lo, hi] of a run of weights that starts
// on a byte of its mask; -1 if there are not that many. Counts blocks, then halves.
template <typename Key>
int64_t find_match(const Key* weights, int64_t n, const uint8_t* mask, Key infinity, Key lo, Key hi, int64_t rank) {
  constexpr int64_t kBlock = 16384;
  const Kernels<Key>& kernels = kernels_for<Key>();
  const auto count = [&](int64_t begin, int64_t size) {
    const uint8_t* bits = mask == nullptr ? nullptr : mask + begin / 8;
    return kernels.scan(weights + begin, size, bits, infinity, lo, hi, nullptr).inside;
  };
  int64_t begin = 0, size = std::min(kBlock, n);
  for (int64_t inside; rank >= (inside = count(begin, size)); size = std::min(kBlock, n - begin)) {
    rank -= inside;
    begin += size;
    if (begin == n) return -1;
  }
  while (size > 8) {
    const int64_t half = (size / 2 + 7) / 8 * 8;
    const int64_t inside = count(begin, half);
    if (rank < inside) {
      size = half;
    } else {
      rank -= inside;
      begin += half;
      size -= half;
    }
  }
  // Fewer than nine left: a prefix of i + 1 weights first holds rank + 1 matches at the match itself.
  for (int64_t i = 0; i < size; ++i) {
    if (count(begin, i + 1) > rank) return begin + i;
  }
  return -1;
}

// Flat index of the first unpruned NaN or Inf of a layer, -1 if there is none.
template <typename Key>
int64_t first_nonfinite(const LayerView& layer, Key infinity) {
  return find_match<Key>(static_cast<const Key*>(layer.weights), layer.n, layer.mask, infinity, infinity,
                         static_cast<Key>(infinity + 1), 0);
}

}  // namespace gmp::cpu
