// The loops of kernels.h, written once over Lanes<Key>: a register of Lanes<Key>::kCount keys.
//
// Each instruction set's translation unit defines Lanes in an anonymous namespace and includes this file inside it.
// Nothing here may call an inline function with external linkage: compiled with wide instructions and merged by the
// linker, it could end up being run on a CPU that lacks them.

template <int kCount>
inline uint64_t load_mask_bits(const uint8_t* mask, int64_t i) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, mask + i / 8, kCount / 8);
  return bits;
}

template <typename Key>
inline Key load_one(const Key* p) {
  Key bits;
  __builtin_memcpy(&bits, p, sizeof(Key));
  return bits;
}

// Far enough ahead to hide memory and, by crossing into the next page, the page walk: hardware prefetchers stop at page
// ends. Measured on Zen 5 with two threads: 58 GB/s without, 67 GB/s with 8 KB, no more with 16 KB. Never faults.
template <typename Key>
inline void prefetch_ahead(const Key* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 8192);
}

inline bool mask_bit(const uint8_t* mask, int64_t i) { return mask == nullptr || (mask[i / 8] >> (i % 8) & 1); }

inline int64_t count_bits(const uint8_t* mask, int64_t n) {
  int64_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) count += __builtin_popcountll(load_mask_bits<64>(mask, i));
  for (; i < n; i += 8) count += __builtin_popcount(mask[i / 8]);
  return count;
}

template <typename Key, bool kMasked, bool kGather>
ScanCounts<Key> scan_loop(const Key* weights, int64_t n, const uint8_t* mask, Key infinity, Key lo, Key hi,
                          Key* gathered) {
  using V = Lanes<Key>;
  constexpr int kCount = V::kCount;
  ScanCounts<Key> counts;
  int64_t below = 0, num_gathered = 0, pruned = 0, i = 0;
  const auto lo_lanes = V::broadcast(lo), hi_lanes = V::broadcast(hi);
  const auto nan = V::broadcast(static_cast<Key>(infinity + 1));
  auto largest = V::broadcast(0);
  for (; i + kCount <= n; i += kCount) {
    uint64_t kept = V::kAll;
    if constexpr (kMasked) {
      kept = load_mask_bits<kCount>(mask, i);
      pruned += kCount - __builtin_popcountll(kept);
      if (kept == 0) continue;  // a dead block costs no read of its weights
    }
    prefetch_ahead(weights + i);
    auto keys = V::min(V::magnitude(V::load(weights + i)), nan);
    if constexpr (kMasked) keys = V::zero_unless(kept, keys);
    largest = V::max(largest, keys);
    const uint64_t less = V::less(keys, lo_lanes) & kept;
    const uint64_t inside = ~V::less(keys, lo_lanes) & ~V::less(hi_lanes, keys) & kept;
    below += __builtin_popcountll(less);
    if constexpr (kGather) V::compress(gathered + num_gathered, keys, inside);
    num_gathered += __builtin_popcountll(inside);
  }
  Key lanes[kCount];
  V::store(lanes, largest);
  for (Key key : lanes) counts.largest = key > counts.largest ? key : counts.largest;
  for (; i < n; ++i) {
    if (kMasked && !mask_bit(mask, i)) {
      ++pruned;
      continue;
    }
    const Key key = magnitude_key(load_one(weights + i), infinity);
    counts.largest = key > counts.largest ? key : counts.largest;
    below += key < lo;
    if (key >= lo && key <= hi) {
      if constexpr (kGather) __builtin_memcpy(gathered + num_gathered, &key, sizeof(Key));
      ++num_gathered;
    }
  }
  counts.below = below;
  counts.inside = num_gathered;
  counts.pruned = pruned;
  return counts;
}

template <typename Key>
ScanCounts<Key> scan(const Key* weights, int64_t n, const uint8_t* mask, Key infinity, Key lo, Key hi, Key* gathered) {
  if (mask == nullptr) {
    return gathered == nullptr ? scan_loop<Key, false, false>(weights, n, mask, infinity, lo, hi, gathered)
                               : scan_loop<Key, false, true>(weights, n, mask, infinity, lo, hi, gathered);
  }
  return gathered == nullptr ? scan_loop<Key, true, false>(weights, n, mask, infinity, lo, hi, gathered)
                             : scan_loop<Key, true, true>(weights, n, mask, infinity, lo, hi, gathered);
}

template <typename Key>
ApplyCounts apply(Key* weights, int64_t n, const uint8_t* mask, uint8_t* kept_bits, Key infinity, Key limit) {
  using V = Lanes<Key>;
  constexpr int kCount = V::kCount;
  ApplyCounts counts;
  const auto limit_lanes = V::broadcast(limit);
  const auto nan = V::broadcast(static_cast<Key>(infinity + 1));
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
    const uint64_t before = mask == nullptr ? V::kAll : load_mask_bits<kCount>(mask, i);
    prefetch_ahead(weights + i);
    const auto raw = V::load(weights + i);
    const uint64_t kept = before & ~V::less(V::min(V::magnitude(raw), nan), limit_lanes);
    if (V::any_set(raw, ~kept)) V::store(weights + i, V::zero_unless(kept, raw));
    if (kept_bits != nullptr) __builtin_memcpy(kept_bits + i / 8, &kept, kCount / 8);
    counts.kept_before += __builtin_popcountll(before);
    counts.kept += __builtin_popcountll(kept);
  }
  for (; i < n; i += 8) {
    unsigned byte = 0;
    for (int64_t j = i; j < n && j < i + 8; ++j) {
      const bool before = mask_bit(mask, j);
      const bool kept = before && magnitude_key(load_one(weights + j), infinity) >= limit;
      const Key zero = 0;
      if (!kept) __builtin_memcpy(weights + j, &zero, sizeof(Key));
      byte |= static_cast<unsigned>(kept) << (j - i);
      counts.kept_before += before;
      counts.kept += kept;
    }
    if (kept_bits != nullptr) kept_bits[i / 8] = static_cast<uint8_t>(byte);
  }
  return counts;
}
