// The loops of kernels.h that find what a pattern protects, and what its blocks score.
//
// Included inside an anonymous namespace: see kernel_set.h.

// Groups of kOf neighbours, as many at once as a register holds. Returns whether an unpruned key is NaN or Inf.
template <DType kDType, int kOf, bool kMasked>
inline bool protect_in_lanes(const LayerView& layer, uint8_t* eligible, int64_t& i) {
  using Key = KeyOf<kDType>;
  constexpr int kCount = kNumLanes<Key>;
  constexpr Key infinity = infinity_of<kDType>();
  const Key* const weights = static_cast<const Key*>(layer.weights);
  const auto nan = broadcast(static_cast<Key>(infinity + 1));
  const int64_t keep = layer.ranking.pattern.keep();
  auto largest = broadcast(Key{0});
  for (; i + kCount <= layer.n; i += kCount) {
    prefetch_ahead(weights + i);
    auto keys = min(magnitude(load_lanes(weights + i)), nan);
    uint64_t kept = kAllLanes<Key>;
    if constexpr (kMasked) {
      kept = load_mask_bits<kCount>(layer.mask, i);
      keys = zero_unless(kept, keys + broadcast(Key{1}));  // 0 is left for what is pruned
    }
    largest = max(largest, keys);
    const uint64_t found = kept & unprotected<kOf, Key>(keys, keep);
    __builtin_memcpy(eligible + i / 8, &found, kCount / 8);
  }
  return !all_less<Key>(largest, static_cast<Key>(infinity + kMasked));
}

template <DType kDType, int kOf>
inline bool protect_in_lanes(const LayerView& layer, uint8_t* eligible, int64_t& i) {
  return layer.mask == nullptr ? protect_in_lanes<kDType, kOf, false>(layer, eligible, i)
                               : protect_in_lanes<kDType, kOf, true>(layer, eligible, i);
}

// The key of a weight with one added; 0 if it is pruned.
template <DType kDType>
inline KeyOf<kDType> ranked_key(const LayerView& layer, int64_t i) {
  if (!mask_bit(layer.mask, i)) return 0;
  const auto raw = load_one(static_cast<const KeyOf<kDType>*>(layer.weights) + i);
  return static_cast<KeyOf<kDType>>(magnitude_key(raw, infinity_of<kDType>()) + 1);
}

inline void set_bit(uint8_t* bits, int64_t i, unsigned value = 1) {
  bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | value << (i % 8));
}

// Groups of up to kMostOf weights, of which kColumns are compared at once, one in each column. Clears what it reads of
// `eligible`, which may not be the mask.
template <DType kDType>
inline KeyOf<kDType> protect_in_columns(const LayerView& layer, uint8_t* eligible, int64_t i) {
  using Key = KeyOf<kDType>;
  constexpr int kMostOf = 32, kColumns = 32;
  const Pattern& pattern = layer.ranking.pattern;
  const int of = static_cast<int>(pattern.of());
  const int64_t stride = pattern.stride(), step = stride == 1 ? of : 1;
  const Key keep = static_cast<Key>(pattern.keep());
  const Key* const weights = static_cast<const Key*>(layer.weights);
  __builtin_memset(eligible + i / 8, 0, static_cast<size_t>((layer.n + 7) / 8 - i / 8));
  Key keys[kMostOf][kColumns] = {}, after[kMostOf][kColumns], most = 0;
  while (i < layer.n) {
    // Neighbouring groups lie side by side, or one after the other if their own weights do.
    const int64_t left = stride == 1 ? (layer.n - i) / of : stride - i % (of * stride);
    const int columns = static_cast<int>(left < kColumns ? left : kColumns);
    for (int j = 0; j < of; ++j) {
      const int64_t first = i + j * stride;
      if (step == 1 && columns == kColumns && layer.mask == nullptr) {
        Key raw[kColumns];
        __builtin_memcpy(raw, weights + first, sizeof(raw));
        for (int c = 0; c < kColumns; ++c) {
          keys[j][c] = static_cast<Key>(magnitude_key(raw[c], infinity_of<kDType>()) + 1);
        }
      } else {
        for (int c = 0; c < columns; ++c) keys[j][c] = ranked_key<kDType>(layer, first + c * step);
      }
      for (int c = 0; c < kColumns; ++c) {
        after[j][c] = 0;
        most = keys[j][c] > most ? keys[j][c] : most;
      }
    }
    for (int j = 1; j < of; ++j) {
      for (int k = 0; k < j; ++k) {
        for (int c = 0; c < kColumns; ++c) {
          const Key comes_after = keys[k][c] >= keys[j][c];
          after[j][c] = static_cast<Key>(after[j][c] + comes_after);
          after[k][c] = static_cast<Key>(after[k][c] + 1 - comes_after);
        }
      }
    }
    for (int j = 0; j < of; ++j) {
      uint8_t found[kColumns];
      for (int c = 0; c < kColumns; ++c) found[c] = (keys[j][c] != 0) & (after[j][c] >= keep);
      for (int c = 0; c < columns; ++c) set_bit(eligible, i + j * stride + c * step, found[c]);
    }
    i += columns * step;
    if (stride > 1 && i % (of * stride) == stride) i += (of - 1) * stride;
  }
  return most;
}

// The key of the weight that comes last but `keep` - 1 in its row, with one added, by halving the range of keys: each
// weight is read as often as a key has bits.
template <DType kDType>
inline KeyOf<kDType> last_but_by_halves(const LayerView& layer, int64_t begin, int64_t end, int64_t keep) {
  using Key = KeyOf<kDType>;
  Key lo = 1, hi = static_cast<Key>(infinity_of<kDType>() + 2);
  while (lo < hi) {
    const Key middle = static_cast<Key>(lo + (hi - lo + 1) / 2);
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) count += ranked_key<kDType>(layer, i) >= middle;
    if (count >= keep) {
      lo = middle;
    } else {
      hi = static_cast<Key>(middle - 1);
    }
  }
  return lo;
}

// Calls visit(first, keys, kept) for registers of keys with one added, 0 for what is pruned, and the bits of what is
// not; then visit_one(place, key) for the weights of [begin, end) that fill none. Masks are read by the byte, so a row
// that does not begin with one is taken weight by weight.
template <DType kDType, typename Visit, typename VisitOne>
inline void for_each_key(const LayerView& layer, int64_t begin, int64_t end, Visit visit, VisitOne visit_one) {
  using Key = KeyOf<kDType>;
  constexpr int kCount = kNumLanes<Key>;
  const Key* const weights = static_cast<const Key*>(layer.weights);
  const auto nan = broadcast(static_cast<Key>(infinity_of<kDType>() + 1)), one = broadcast(Key{1});
  int64_t i = begin;
  for (; begin % 8 == 0 && i + kCount <= end; i += kCount) {
    prefetch_ahead(weights + i);
    const uint64_t kept = layer.mask == nullptr ? kAllLanes<Key> : load_mask_bits<kCount>(layer.mask, i);
    visit(i, zero_unless(kept, min(magnitude(load_lanes(weights + i)), nan) + one), kept);
  }
  for (; i < end; ++i) visit_one(i, ranked_key<kDType>(layer, i));
}

// The key of that rank from above, from 1, which gets to its place.
template <typename Key>
inline Key ranked_from_above(Key* keys, int n, int64_t rank) {
  for (int64_t r = 0; r < rank; ++r) {
    for (int k = static_cast<int>(r) + 1; k < n; ++k) {
      const Key first = keys[r], other = keys[k];
      keys[r] = first > other ? first : other;
      keys[k] = first > other ? other : first;
    }
  }
  return keys[rank - 1];
}

// The same. The largest keys of the lanes of two registers say what it must at least be, and few weights are above
// that.
template <DType kDType>
inline KeyOf<kDType> last_but(const LayerView& layer, int64_t begin, int64_t end, int64_t keep) {
  using Key = KeyOf<kDType>;
  constexpr int kCount = kNumLanes<Key>, kRoom = 512;
  if (keep > kCount) return last_but_by_halves<kDType>(layer, begin, end, keep);
  Lanes<Key> largest[2] = {broadcast(Key{0}), broadcast(Key{0})};
  for_each_key<kDType>(
      layer, begin, end,
      [&](int64_t i, Lanes<Key> keys, uint64_t) {
        Lanes<Key>& own = largest[(i - begin) / kCount % 2];
        own = max(own, keys);
      },
      [](int64_t, Key) {});
  Key lanes[2 * kCount], found[kRoom];
  store_lanes(lanes, largest[0]);
  store_lanes(lanes + kCount, largest[1]);
  const Key least = ranked_from_above(lanes, 2 * kCount, keep);
  const auto least_lanes = broadcast(least);
  int64_t num_found = 0;
  const auto put = [&](Key key) {
    if (key == 0 || key < least) return;
    if (num_found < kRoom) found[num_found] = key;
    ++num_found;
  };
  for_each_key<kDType>(
      layer, begin, end,
      [&](int64_t, Lanes<Key> keys, uint64_t kept) {
        uint64_t hits = kept & ~less(keys, least_lanes);
        if (hits == 0) return;
        Key own[kCount];
        store_lanes(own, keys);
        for (; hits != 0; hits &= hits - 1) put(own[__builtin_ctzll(hits)]);
      },
      [&](int64_t, Key key) { put(key); });
  if (num_found > kRoom) return last_but_by_halves<kDType>(layer, begin, end, keep);
  return num_found < keep ? Key{1} : ranked_from_above(found, static_cast<int>(num_found), keep);
}

// Groups that are whole rows. Their ties are settled by the row-major index.
template <DType kDType>
inline KeyOf<kDType> protect_in_rows(const LayerView& layer, uint8_t* eligible) {
  using Key = KeyOf<kDType>;
  constexpr int kCount = kNumLanes<Key>;
  const int64_t row = layer.ranking.pattern.of(), keep = layer.ranking.pattern.keep();
  __builtin_memset(eligible, 0, static_cast<size_t>((layer.n + 7) / 8));
  auto largest = broadcast(Key{0});
  Key most = 0;
  for (int64_t begin = 0; begin < layer.n; begin += row) {
    const Key last = last_but<kDType>(layer, begin, begin + row, keep);
    const auto last_lanes = broadcast(last);
    int64_t above = 0, ties = 0;
    for_each_key<kDType>(
        layer, begin, begin + row,
        [&](int64_t i, Lanes<Key> keys, uint64_t kept) {
          largest = max(largest, keys);
          const uint64_t lower = kept & less(keys, last_lanes), higher = less(last_lanes, keys);
          above += __builtin_popcountll(higher);
          ties += __builtin_popcountll(kept & ~lower & ~higher);
          __builtin_memcpy(eligible + i / 8, &lower, kCount / 8);
        },
        [&](int64_t i, Key key) {
          most = key > most ? key : most;
          above += key > last;
          ties += key == last;
          set_bit(eligible, i, key != 0 && key < last);
        });
    if (ties <= keep - above) continue;
    const bool is_row_major = layer.filter.size() == 1;
    const int64_t channels = is_row_major ? row : layer.filter.channels, positions = row / channels;
    int64_t left = keep - above;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < positions; ++p) {
        const int64_t i = begin + p * channels + c;
        if (ranked_key<kDType>(layer, i) == last && --left < 0) set_bit(eligible, i);
      }
    }
  }
  Key lanes[kCount];
  store_lanes(lanes, largest);
  for (Key key : lanes) most = key > most ? key : most;
  return most;
}

template <DType kDType>
bool protect(const LayerView& layer, uint8_t* eligible) {
  const Pattern& pattern = layer.ranking.pattern;
  if (pattern.of() > 32 || pattern.is_permuted(layer.filter))
    return protect_in_rows<kDType>(layer, eligible) > infinity_of<kDType>();
  int64_t i = 0;
  bool nonfinite = false;
  if (pattern.stride() == 1 && pattern.of() == 2) nonfinite = protect_in_lanes<kDType, 2>(layer, eligible, i);
  if (pattern.stride() == 1 && pattern.of() == 4) nonfinite = protect_in_lanes<kDType, 4>(layer, eligible, i);
  if (pattern.stride() == 1 && pattern.of() == 8) nonfinite = protect_in_lanes<kDType, 8>(layer, eligible, i);
  return (i < layer.n && protect_in_columns<kDType>(layer, eligible, i) > infinity_of<kDType>()) || nonfinite;
}

// Adds to each sum the next kCols magnitudes, or `cols` of them if kCols is 0, one after the other.
template <int kCols, typename T, typename Value>
inline void add_columns(const Value* __restrict values, int64_t n, int64_t cols, T* __restrict sums) {
  const int64_t step = kCols == 0 ? cols : kCols;
  for (int64_t s = 0; s < n; ++s) {
    T sum = sums[s];
    for (int64_t c = 0; c < step; ++c) sum += values[s * step + c] < 0 ? -values[s * step + c] : values[s * step + c];
    sums[s] = sum;
  }
}

template <typename T, typename Value>
inline void add_row(const Value* values, int64_t n, int64_t cols, T* sums) {
  switch (cols) {
    case 1:
      return add_columns<1>(values, n, cols, sums);
    case 2:
      return add_columns<2>(values, n, cols, sums);
    case 4:
      return add_columns<4>(values, n, cols, sums);
    case 8:
      return add_columns<8>(values, n, cols, sums);
    case 16:
      return add_columns<16>(values, n, cols, sums);
    default:
      return add_columns<0>(values, n, cols, sums);
  }
}

template <DType kDType>
void score(const LayerView& layer, int64_t begin, int64_t end, void* sums, uint8_t* bits) {
  using Key = KeyOf<kDType>;
  using T = ComputeOf<kDType>;
  typedef T Stored __attribute__((may_alias));  // weights that are stored as they are added
  constexpr bool kIsStored = sizeof(T) == sizeof(Key);
  constexpr int64_t kMost = 1024;  // values at a time, besides those that fill a vector
  constexpr int kWidth = kWidthOf<T>;
  const Pattern& pattern = layer.ranking.pattern;
  const Filter& filter = layer.ranking.filter;
  const int64_t across = pattern.across(), cols = pattern.cols(), width = pattern.width();
  const Key* const weights = static_cast<const Key*>(layer.weights);
  Key raw[kMost + kWidth] = {};
  alignas(64) T values[kMost + kWidth];
  const bool is_row_major = filter.size() == 1;
  const auto place = [&](int64_t row, int64_t column) {
    if (is_row_major) return row * width + column;
    return row * width + column % filter.positions * filter.channels + column / filter.positions;
  };
  if (layer.mask != nullptr) __builtin_memset(bits, 0, static_cast<size_t>((end - begin + 7) / 8));
  for (int64_t b = begin; b < end;) {
    const int64_t column = b % across, first_row = b / across * pattern.rows();
    int64_t count = kMost / cols;
    count = count < across - column ? count : across - column;
    count = count < end - b ? count : end - b;
    T* const own = static_cast<T*>(sums) + (b - begin);
    for (int64_t s = 0; s < count; ++s) {
      own[s] = 0;
      if (layer.mask != nullptr && mask_bit(layer.mask, place(first_row, (column + s) * cols))) {
        set_bit(bits, b - begin + s);
      }
    }
    const int64_t num_values = count * cols;
    for (int64_t r = first_row; r < first_row + pattern.rows(); ++r) {
      const Key* from = weights + place(r, column * cols);
      if constexpr (kIsStored) {
        if (is_row_major) {
          add_row(reinterpret_cast<const Stored*>(from), count, cols, own);
          continue;
        }
      }
      int64_t v = 0;
      for (; is_row_major && v + kWidth <= num_values; v += kWidth) {
        store_vector(values + v, load_weights<kDType>(from + v));
      }
      for (int64_t i = v; i < num_values; ++i) raw[i] = load_one(weights + place(r, column * cols + i));
      for (; v < num_values; v += kWidth) store_vector(values + v, load_weights<kDType>(raw + v));
      add_row(values, count, cols, own);
    }
    b += count;
  }
}
