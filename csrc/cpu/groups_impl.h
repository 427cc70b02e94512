// What is protected of groups of neighbours that fill a register: N:M with its usual sizes.
//
// Included inside an anonymous namespace: see kernel_set.h. In a group the order is that of all weights: of equal keys
// the lower index comes last, and what is pruned comes first. So a weight is protected if fewer than `keep` weights of
// its group come after it.

// Every lane as the one that lies `kBy` places after it in its group of kOf lanes, cyclically; and one more if that
// lies before it, so that `less` finds an equal key there to come after it. Keys are moved in the compiler's own
// vectors.
template <int kOf, int kBy, typename Key, size_t... kLane>
inline Lanes<Key> others(Lanes<Key> keys, std::index_sequence<kLane...>) {
  typedef Key Movable __attribute__((vector_size(sizeof(Lanes<Key>))));
  constexpr Movable from_before = {(kLane % kOf + kBy >= kOf)...};
  Movable moved;
  __builtin_memcpy(&moved, &keys, sizeof(keys));
  moved = __builtin_shufflevector(moved, moved, (kLane / kOf * kOf + (kLane % kOf + kBy) % kOf)...) + from_before;
  __builtin_memcpy(&keys, &moved, sizeof(keys));
  return keys;
}

// The bits of every lane whose place in its group of kOf lanes is below kBy.
template <int kOf, int kBy>
constexpr uint64_t first_lanes() {
  uint64_t bits = 0;
  for (int j = 0; j < 64; ++j) bits |= static_cast<uint64_t>(j % kOf < kBy) << j;
  return bits;
}

// Adds up, bit by bit of the sums, for each lane, how many of those 1 to kBy places after it and before it in its
// group, cyclically, come after it in the order.
template <int kOf, int kBy, typename Key>
inline void count_after(Lanes<Key> keys, uint64_t* sums) {
  const auto add = [&](uint64_t bits) {
    for (int t = 0; 1 << t < kOf; ++t) {
      const uint64_t carry = sums[t] & bits;
      sums[t] ^= bits;
      bits = carry;
    }
  };
  const uint64_t after = less(keys, others<kOf, kBy, Key>(keys, std::make_index_sequence<kNumLanes<Key>>{}));
  add(after);
  if constexpr (2 * kBy < kOf) {
    // Of two weights one comes after the other.
    constexpr uint64_t first = first_lanes<kOf, kBy>();
    add(~((after << kBy & ~first) | (after >> (kOf - kBy) & first)));
  }
  if constexpr (kBy > 1) count_after<kOf, kBy - 1, Key>(keys, sums);
}

// The lanes, of groups of kOf, after which `keep` or more come in the order.
template <int kOf, typename Key>
inline uint64_t unprotected(Lanes<Key> keys, int64_t keep) {
  uint64_t sums[3] = {}, found = ~uint64_t{0};
  count_after<kOf, kOf / 2, Key>(keys, sums);
  for (int t = 0; 1 << t < kOf; ++t) found = keep >> t & 1 ? sums[t] & found : sums[t] | found;
  return found;
}

// Size of the groups that the loops over weights look at themselves, as hardware takes them: 2:4.
inline constexpr int kInLoop = 4;

// Whether the weight at i is neither pruned nor protected in its group of kInLoop.
template <DType kDType>
inline bool is_unprotected(const LayerView& layer, int64_t i) {
  const int64_t first = i / kInLoop * kInLoop;
  const auto key_at = [&](int64_t j) {
    return magnitude_key(load_one(static_cast<const KeyOf<kDType>*>(layer.weights) + j), infinity_of<kDType>());
  };
  int64_t after = 0;
  for (int64_t j = first; j < first + kInLoop; ++j) {
    after += j != i && mask_bit(layer.mask, j) && (j < i ? key_at(j) >= key_at(i) : key_at(j) > key_at(i));
  }
  return mask_bit(layer.mask, i) && after >= layer.ranking.pattern.keep();
}
