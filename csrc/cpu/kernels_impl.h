// The loops of kernels.h over weights and masks, written once over Lanes<Key>: a register of keys.
//
// Each instruction set's translation unit defines Lanes in an anonymous namespace and includes this file inside it.
// Nothing here may call an inline function with external linkage: compiled with wide instructions and merged by the
// linker, it could end up being run on a CPU that lacks them.

template <typename Key>
inline constexpr int kNumLanes = sizeof(Lanes<Key>) / sizeof(Key);
// Every lane's bit.
template <typename Key>
inline constexpr uint64_t kAllLanes = (uint64_t{1} << kNumLanes<Key>)-1;

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

// Far enough ahead to hide the latency of memory and, by crossing into the next page, of the page walk: hardware
// prefetchers stop at page ends. Measured on Zen 5 with two threads: 58 GB/s without, 67 GB/s with 8 KB, no more with
// 16 KB. Prefetches never fault.
template <typename Key>
inline void prefetch_ahead(const Key* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 8192);
}

inline bool mask_bit(const uint8_t* mask, int64_t i) { return mask == nullptr || (mask[i / 8] >> (i % 8) & 1); }

inline int64_t count_bits(const uint8_t* mask, int64_t n) {
  int64_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) count += __builtin_popcountll(load_mask_bits<64>(mask, i));
  for (; i + 8 <= n; i += 8) count += __builtin_popcount(mask[i / 8]);
  for (; i < n; ++i) count += mask_bit(mask, i);
  return count;
}

// Whether each lane is below a key.
template <typename Key>
inline bool all_less(Lanes<Key> r, Key key) {
  return less(r, broadcast(key)) == kAllLanes<Key>;
}

#include "groups_impl.h"

// kOf is 0, or kInLoop if the layer has groups of that size, of whose weights the unprotected ones count.
template <DType kDType, bool kMasked, bool kGather, int kOf>
inline BracketCounts scan_loop(const LayerView& layer, int64_t i, int64_t end, const Bracket& bracket, void* gathered) {
  using Key = KeyOf<kDType>;
  constexpr Key infinity = infinity_of<kDType>();
  constexpr int kCount = kNumLanes<Key>;
  const Key* const weights = static_cast<const Key*>(layer.weights);
  const uint8_t* const mask = layer.mask;
  Key* const keys_inside = static_cast<Key*>(gathered);
  const Key lo = static_cast<Key>(bracket.lo), hi = static_cast<Key>(bracket.hi);
  int64_t below = 0, inside = 0, pruned = 0;
  const auto lo_lanes = broadcast(lo), hi_lanes = broadcast(hi);
  const auto nan = broadcast(static_cast<Key>(infinity + 1));
  auto largest_lanes = broadcast(Key{0});
  // The registers with keys inside, which are a few of a tile: their first lanes, and which of their lanes are inside.
  constexpr bool kLists = kGather && kIsCompressSlow<Lanes<Key>>;
  constexpr int64_t kTile = 4096;  // weights, which stay in L1 until their keys are gathered
  uint16_t hits[kTile / kCount];
  uint32_t hit_bits[kTile / kCount];
  while (i + kCount <= end) {
    const int64_t first = i, until = kLists && first + kTile < end ? first + kTile : end;
    int64_t num_hits = 0;
    for (; i + kCount <= until; i += kCount) {
      uint64_t kept = kAllLanes<Key>;
      if constexpr (kMasked) {
        kept = load_mask_bits<kCount>(mask, i);
        pruned += kCount - __builtin_popcountll(kept);
        // A dead run costs no read of its weights. Asked of every register, the answer would be hard to predict.
        if (i + 64 <= until && load_mask_bits<64>(mask, i) == 0) {
          pruned += 64 - kCount;
          i += 64 - kCount;
          continue;
        }
      }
      prefetch_ahead(weights + i);
      auto keys = min(magnitude(load_lanes(weights + i)), nan);
      if constexpr (kMasked) keys = zero_unless(kept, keys);
      largest_lanes = max(largest_lanes, keys);
      if constexpr (kOf != 0) {
        // One more, so that 0 is left for what is pruned.
        const auto in_groups = kMasked ? zero_unless(kept, keys + broadcast(Key{1})) : keys;
        const uint64_t protected_lanes = kept & ~unprotected<kOf, Key>(in_groups, layer.ranking.pattern.keep());
        pruned += __builtin_popcountll(protected_lanes);
        kept &= ~protected_lanes;
      }
      const uint64_t lower = less(keys, lo_lanes);
      const uint64_t chosen = ~lower & ~less(hi_lanes, keys) & kept;
      below += __builtin_popcountll(lower & kept);
      if constexpr (kLists) {
        // Without a branch, which no predictor would learn.
        hits[num_hits] = static_cast<uint16_t>(i - first);
        hit_bits[num_hits] = static_cast<uint32_t>(chosen);
        num_hits += chosen != 0;
      } else {
        if constexpr (kGather) compress(keys_inside + inside, keys, chosen);
        inside += __builtin_popcountll(chosen);
      }
    }
    for (int64_t k = 0; k < num_hits; ++k) {
      const auto keys = min(magnitude(load_lanes(weights + first + hits[k])), nan);
      compress(keys_inside + inside, keys, hit_bits[k]);
      inside += __builtin_popcount(hit_bits[k]);
    }
  }
  Key lanes[kCount], largest = 0;
  store_lanes(lanes, largest_lanes);
  for (Key key : lanes) largest = key > largest ? key : largest;
  for (; i < end; ++i) {
    if (kMasked && !mask_bit(mask, i)) {
      ++pruned;
      continue;
    }
    const Key key = magnitude_key(load_one(weights + i), infinity);
    largest = key > largest ? key : largest;
    if (kOf != 0 && !is_unprotected<kDType>(layer, i)) {
      ++pruned;
      continue;
    }
    below += key < lo;
    if (key >= lo && key <= hi) {
      if constexpr (kGather) __builtin_memcpy(keys_inside + inside, &key, sizeof(Key));
      ++inside;
    }
  }
  return {below, inside, pruned, largest >= infinity};
}

template <DType kDType, int kOf>
inline BracketCounts scan_groups(const LayerView& layer, int64_t begin, int64_t end, const Bracket& bracket,
                                 void* gathered) {
  if (layer.mask == nullptr) {
    return gathered == nullptr ? scan_loop<kDType, false, false, kOf>(layer, begin, end, bracket, gathered)
                               : scan_loop<kDType, false, true, kOf>(layer, begin, end, bracket, gathered);
  }
  return gathered == nullptr ? scan_loop<kDType, true, false, kOf>(layer, begin, end, bracket, gathered)
                             : scan_loop<kDType, true, true, kOf>(layer, begin, end, bracket, gathered);
}

template <DType kDType>
BracketCounts scan(const LayerView& layer, int64_t begin, int64_t end, const Bracket& bracket, void* gathered) {
  return layer.ranking.pattern.kind == kGroups ? scan_groups<kDType, kInLoop>(layer, begin, end, bracket, gathered)
                                               : scan_groups<kDType, 0>(layer, begin, end, bracket, gathered);
}

template <DType kDType>
int64_t find(const LayerView& layer, int64_t begin, int64_t end, uint64_t wanted, uint16_t* places) {
  using Key = KeyOf<kDType>;
  constexpr Key infinity = infinity_of<kDType>();
  constexpr int kCount = kNumLanes<Key>;
  const Key* const weights = static_cast<const Key*>(layer.weights);
  const auto wanted_lanes = broadcast(static_cast<Key>(wanted)), nan = broadcast(static_cast<Key>(infinity + 1));
  int64_t count = 0, i = begin;
  for (; i + kCount <= end; i += kCount) {
    prefetch_ahead(weights + i);
    const auto keys = min(magnitude(load_lanes(weights + i)), nan);
    uint64_t matches = kAllLanes<Key> & ~less(keys, wanted_lanes) & ~less(wanted_lanes, keys);
    // Most registers hold none, and need no look at the mask.
    if (matches != 0 && layer.mask != nullptr) matches &= load_mask_bits<kCount>(layer.mask, i);
    for (; matches != 0; matches &= matches - 1) {
      places[count++] = static_cast<uint16_t>(i - begin + __builtin_ctzll(matches));
    }
  }
  for (; i < end; ++i) {
    const bool is_match = magnitude_key(load_one(weights + i), infinity) == wanted && mask_bit(layer.mask, i);
    if (is_match) places[count++] = static_cast<uint16_t>(i - begin);
  }
  return count;
}

// Keeps the keys >= limit in all whole registers of the weights [i, end), and what is protected.
template <DType kDType, bool kWrites, int kOf>
inline int64_t apply_lanes(const LayerView& layer, uint8_t* kept_bits, int64_t i, int64_t end, KeyOf<kDType> limit,
                           int64_t& kept_before) {
  using Key = KeyOf<kDType>;
  constexpr int kCount = kNumLanes<Key>;
  Key* const weights = static_cast<Key*>(layer.weights);
  const uint8_t* const mask = layer.mask;
  const auto limit_lanes = broadcast(limit);
  const auto nan = broadcast(static_cast<Key>(infinity_of<kDType>() + 1));
  int64_t num_kept = 0, num_before = 0;
  for (; i + kCount <= end; i += kCount) {
    const uint64_t before = mask == nullptr ? kAllLanes<Key> : load_mask_bits<kCount>(mask, i);
    prefetch_ahead(weights + i);
    const auto raw = load_lanes(weights + i);
    const auto keys = min(magnitude(raw), nan);
    uint64_t lower = less(keys, limit_lanes);
    if constexpr (kOf != 0) {
      const auto in_groups = zero_unless(before, keys + broadcast(Key{1}));
      lower &= unprotected<kOf, Key>(in_groups, layer.ranking.pattern.keep());
    }
    const uint64_t kept = before & ~lower;
    if (kWrites && any_set(raw, ~kept)) store_lanes(weights + i, zero_unless(kept, raw));
    if (kept_bits != nullptr) __builtin_memcpy(kept_bits + i / 8, &kept, kCount / 8);
    num_before += __builtin_popcountll(before);
    num_kept += __builtin_popcountll(kept);
  }
  kept_before += num_before;
  return num_kept;
}

template <DType kDType, bool kWrites, int kOf>
inline int64_t apply_groups(const LayerView& layer, int64_t begin, int64_t end, uint8_t* kept_bits, uint64_t key,
                            int64_t tie_index, int64_t& kept_before) {
  using Key = KeyOf<kDType>;
  constexpr Key zero = 0;
  Key* const weights = static_cast<Key*>(layer.weights);
  int64_t num_kept = 0, i = begin;
  // Ties before the tie index stay, and those from it on are pruned. Its mask byte is done weight by weight.
  for (int side = 0; side < 2; ++side) {
    const int64_t until = side == 1 || tie_index > end ? end : tie_index;
    if (i >= until) continue;
    const Key limit = static_cast<Key>(key + (side == 1));
    num_kept += apply_lanes<kDType, kWrites, kOf>(layer, kept_bits, i, until, limit, kept_before);
    for (i += (until - i) / kNumLanes<Key> * kNumLanes<Key>; i < until; i += 8) {
      unsigned byte = 0;
      for (int64_t j = i; j < end && j < i + 8; ++j) {
        const Key own = magnitude_key(load_one(weights + j), infinity_of<kDType>());
        const bool before = mask_bit(layer.mask, j);
        const bool above = own >= key + (j >= tie_index);
        const bool kept = before && (above || (kOf != 0 && !is_unprotected<kDType>(layer, j)));
        kept_before += before;
        if (kWrites && !kept) __builtin_memcpy(weights + j, &zero, sizeof(Key));
        byte |= static_cast<unsigned>(kept) << (j - i);
      }
      if (kept_bits != nullptr) kept_bits[i / 8] = static_cast<uint8_t>(byte);
      num_kept += __builtin_popcount(byte);
    }
  }
  return num_kept;
}

template <DType kDType, bool kWrites = true>
int64_t apply(const LayerView& layer, int64_t begin, int64_t end, uint8_t* kept_bits, uint64_t key, int64_t tie_index,
              int64_t& kept_before) {
  return kWrites && layer.ranking.pattern.kind == kGroups
             ? apply_groups<kDType, kWrites, kInLoop>(layer, begin, end, kept_bits, key, tie_index, kept_before)
             : apply_groups<kDType, kWrites, 0>(layer, begin, end, kept_bits, key, tie_index, kept_before);
}

template <typename Key>
int64_t pack(const void* from, const uint8_t* mask, int64_t n, void* to) {
  const Key* const src = static_cast<const Key*>(from);
  Key* const dst = static_cast<Key*>(to);
  int64_t count = 0, i = 0;
  for (; i + kNumLanes<Key> <= n; i += kNumLanes<Key>) {
    const uint64_t kept = load_mask_bits<kNumLanes<Key>>(mask, i);
    compress(dst + count, load_lanes(src + i), kept);
    count += __builtin_popcountll(kept);
  }
  for (; i < n; ++i) {
    if (mask_bit(mask, i)) dst[count++] = load_one(src + i);
  }
  return count;
}

template <typename Key>
void unpack(const void* from, const uint8_t* mask, int64_t n, void* to) {
  const Key* src = static_cast<const Key*>(from);
  Key* const dst = static_cast<Key*>(to);
  int64_t i = 0;
  for (; i + kNumLanes<Key> <= n; i += kNumLanes<Key>) {
    const uint64_t kept = load_mask_bits<kNumLanes<Key>>(mask, i);
    store_lanes(dst + i, expand(src, kept));
    src += __builtin_popcountll(kept);
  }
  for (; i < n; ++i) {
    const Key key = mask_bit(mask, i) ? *src++ : Key{0};
    __builtin_memcpy(dst + i, &key, sizeof(Key));
  }
}
