// The optimizer step, written once over vectors; memory is walked in blocks of them.
//
// Included by each instruction set's translation unit inside its anonymous namespace, after Lanes and update_rule.h.
// Products and sums are never contracted (-ffp-contract=off) and every operation is exactly rounded, so all instruction
// sets and all numbers of threads give the same bits. The order of operations is that of torch.optim's single-tensor
// loops.
//
// A pruned weight costs nothing: blocks whose mask bits are all zero are skipped (their values are zero already). With
// compact state, the kept weights and gradients of a tile are first packed together, so that the arithmetic runs on
// kept weights only and the state is read in one piece.

template <typename T>
inline Vec<T> load_vector(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
inline void store_vector(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Conversion of weights to vectors and back: floats and doubles are stored as they are computed.
template <DType kDType>
inline Vec<ComputeOf<kDType>> load_weights(const KeyOf<kDType>* p) {
  if constexpr (kDType == DType::bfloat16) {
    HalfBits half;
    __builtin_memcpy(&half, p, sizeof(half));
    return (Floats)(__builtin_convertvector(half, FloatBits) << 16);
  } else if constexpr (kDType == DType::float16) {
    return float_from_half(p);
  } else {
    static_assert(sizeof(KeyOf<kDType>) == sizeof(ComputeOf<kDType>), "this dtype needs conversions");
    Vec<ComputeOf<kDType>> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}
template <DType kDType>
inline void store_weights(KeyOf<kDType>* p, Vec<ComputeOf<kDType>> v) {
  if constexpr (kDType == DType::bfloat16) {
    // Round to nearest even; NaN becomes the quiet NaN torch writes.
    const FloatBits bits = (FloatBits)v;
    const FloatBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const FloatBits is_nan = (FloatBits)((bits & 0x7fffffff) > 0x7f800000);
    const HalfBits half = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits);
    __builtin_memcpy(p, &half, sizeof(half));
  } else if constexpr (kDType == DType::float16) {
    half_from_float(p, v);
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
}

// Stores state, which is rounded if it is kept in fewer bits than it is computed in.
template <DType kState, typename C>
inline void store_state(KeyOf<kState>* p, Vec<ComputeOf<kState>> v, const C& c) {
  if constexpr (kState == DType::bfloat16) {
    const FloatBits rounded = rounded_at_random((FloatBits)v, v != v, rounding_factor(c));
    const HalfBits half = __builtin_convertvector(rounded, HalfBits);
    __builtin_memcpy(p, &half, sizeof(half));
  } else {
    store_weights<kState>(p, v);
  }
}

// Zero in the lanes whose bit is not set.
template <typename T>
inline Vec<T> zero_unless(uint64_t bits, Vec<T> v) {
  using Mask = decltype(v == v);
  Mask lane;
  for (int j = 0; j < kWidthOf<T>; ++j) lane[j] = 1 << j;
  return (Vec<T>)((Mask)v & ((static_cast<int32_t>(bits) & lane) == lane));
}

// The arrays of a tensor, at one of its weights. Their number is known to the compiler, so that no block has to test
// it.
template <DType kDType, int kNumStates, bool kHasMaster, DType kState>
struct Arrays {
  using T = ComputeOf<kDType>;
  using Bits = KeyOf<kDType>;
  using StateBits = KeyOf<kState>;
  Bits* weights;
  const Bits* grads;
  T* master;
  StateBits* state[kMaxStates] = {};

  Arrays(const UpdateTensor& t, int64_t begin)
      : weights(static_cast<Bits*>(t.weights) + begin),
        grads(static_cast<const Bits*>(t.grads) + begin),
        master(kHasMaster ? static_cast<T*>(t.master) + begin : nullptr) {
    for (int k = 0; k < kNumStates; ++k) state[k] = static_cast<StateBits*>(t.state[k]);
    advance_state(t.chunk_offsets == nullptr ? begin : t.chunk_offsets[begin / kChunk]);
  }

  void advance_state(int64_t i) {
    for (int k = 0; k < kNumStates; ++k) state[k] += i;
  }
  Arrays at(int64_t i) const {
    Arrays there = *this;
    there.weights += i;
    there.grads += i;
    if constexpr (kHasMaster) there.master += i;
    there.advance_state(i);
    return there;
  }
  // always_inline, because otherwise GCC finds that it has no effect, and drops it.
  template <int kCache>
  __attribute__((always_inline)) void fetch_weight(int64_t i) const {
    __builtin_prefetch(grads + i, 0, kCache);
    __builtin_prefetch(weights + i, 0, kCache);
    if constexpr (kHasMaster) __builtin_prefetch(master + i, 0, kCache);
  }
  template <int kCache>
  __attribute__((always_inline)) void fetch(int64_t i) const {
    fetch_weight<kCache>(i);
    for (int k = 0; k < kNumStates; ++k) __builtin_prefetch(state[k] + i, 0, kCache);
  }
};

// One step of a block of weights, gradients and state in memory; `bits` are the lanes that are kept.
template <Rule kRule, bool kMasked, DType kDType, int kNumStates, bool kHasMaster, DType kState, typename C>
inline void update_block(const Arrays<kDType, kNumStates, kHasMaster, kState>& a, uint64_t bits, const C& c) {
  using T = ComputeOf<kDType>;
  for (int i = 0; i < kLanesOf<T>; i += kWidthOf<T>) {
    Vec<T> w, s[kMaxStates] = {};
    if constexpr (kHasMaster) {
      w = load_vector(a.master + i);
    } else {
      w = load_weights<kDType>(a.weights + i);
    }
    for (int k = 0; k < kNumStates; ++k) s[k] = load_weights<kState>(a.state[k] + i);
    update_one<kRule>(w, load_weights<kDType>(a.grads + i), s, kNumStates, c);
    if constexpr (kMasked) {
      w = zero_unless<T>(bits >> i, w);
      for (Vec<T>& v : s) v = zero_unless<T>(bits >> i, v);
    }
    for (int k = 0; k < kNumStates; ++k) store_state<kState>(a.state[k] + i, s[k], c);
    if constexpr (kHasMaster) store_vector(a.master + i, w);
    store_weights<kDType>(a.weights + i, w);
  }
}

// The same for fewer than a block, through copies padded with zeros.
template <Rule kRule, bool kMasked, DType kDType, int kNumStates, bool kHasMaster, DType kState, typename C>
void update_partial(const Arrays<kDType, kNumStates, kHasMaster, kState>& a, uint64_t bits, int64_t n, const C& c) {
  using T = ComputeOf<kDType>;
  using Bits = KeyOf<kDType>;
  constexpr int kLanes = kLanesOf<T>;
  Bits w[kLanes] = {}, g[kLanes] = {};
  T m[kLanes] = {};
  KeyOf<kState> s[kMaxStates][kLanes] = {};
  __builtin_memcpy(w, a.weights, n * sizeof(Bits));
  __builtin_memcpy(g, a.grads, n * sizeof(Bits));
  if constexpr (kHasMaster) __builtin_memcpy(m, a.master, n * sizeof(T));
  for (int k = 0; k < kNumStates; ++k) __builtin_memcpy(s[k], a.state[k], n * sizeof(s[k][0]));
  Arrays<kDType, kNumStates, kHasMaster, kState> copies = a;
  copies.weights = w;
  copies.grads = g;
  copies.master = m;
  for (int k = 0; k < kNumStates; ++k) copies.state[k] = s[k];
  update_block<kRule, kMasked>(copies, bits, c);
  __builtin_memcpy(a.weights, w, n * sizeof(Bits));
  if constexpr (kHasMaster) __builtin_memcpy(a.master, m, n * sizeof(T));
  for (int k = 0; k < kNumStates; ++k) __builtin_memcpy(a.state[k], s[k], n * sizeof(s[k][0]));
}

// How many blocks, or kept weights, ahead memory is prefetched, and into which cache. Hardware prefetchers do not
// follow a stream with holes, so where up to half of the blocks are dead it is faster to fetch these too than to skip
// them. A dense walk along all blocks only has to get past the end of a page, where the hardware stops; fetching
// further ahead costs up to 10 %, measured on Zen 4. Lines that lie scattered, or that wait for the packing of others,
// are fetched into L2: on its way to L1 a line holds one of few places for as long as memory takes, and scattered lines
// then took up to three times as long. None is fetched "for writing", which took as long.
inline constexpr int64_t kAhead = 4, kLiveAhead = 24, kPackAhead = 32;
inline constexpr int kIntoL1 = 3, kIntoL2 = 2;

inline bool walks_all(int64_t num_live, int64_t num_blocks) { return num_live * 2 > num_blocks; }

// The blocks of kLanes weights, at most kMostBlocks, in which any weight is kept. They are collected ahead of the work,
// without a branch: at 95 % sparsity every other block is dead, in an order that no predictor learns. The next blocks
// must also be known early to be fetched early, because the hardware fetches ahead only at even strides.
inline constexpr int64_t kMostBlocks = 2048, kListSlack = 64;

// A register of the numbers from `first` on.
inline Lanes<uint16_t> numbers_from(int64_t first) {
  uint16_t numbers[kNumLanes<uint16_t>];
  for (int j = 0; j < kNumLanes<uint16_t>; ++j) numbers[j] = static_cast<uint16_t>(j);
  return load_lanes(numbers) + broadcast(static_cast<uint16_t>(first));
}

template <int kLanes>
int64_t live_blocks(const uint8_t* mask, int64_t num_blocks, uint16_t* blocks) {
  int64_t count = 0, b = 0;
  using Registers = Lanes<uint16_t>;
  if constexpr (kLanes == 16 && !std::is_same_v<Registers, PlainLanes<uint16_t>>) {
    // The bits of a block are a lane, so its number is compressed as a key is.
    constexpr int kCount = kNumLanes<uint16_t>;
    static_assert(kCount <= kListSlack);
    for (; b + kCount <= num_blocks; b += kCount) {
      uint16_t bits[kCount];
      __builtin_memcpy(bits, mask + 2 * b, sizeof(bits));
      const uint64_t live = less(broadcast(uint16_t{0}), min(load_lanes(bits), broadcast(uint16_t{1})));
      compress(blocks + count, numbers_from(b), live);
      count += __builtin_popcountll(live);
    }
  }
  for (; b < num_blocks; ++b) {
    blocks[count] = static_cast<uint16_t>(b);
    count += load_mask_bits<kLanes>(mask, b * kLanes) != 0;
  }
  return count;
}

// The places of the kept weights among n, given the blocks of kPlaceBlock that have any. `places` needs room for
// kListSlack more: the first kLiveAhead of it can be fetched like the others.
inline constexpr int kPlaceBlock = 16;

inline int64_t kept_places(const uint8_t* mask, int64_t n, const uint16_t* blocks, int64_t num_live, uint16_t* places) {
  constexpr int kCount = kNumLanes<uint16_t> < kPlaceBlock ? kNumLanes<uint16_t> : kPlaceBlock;
  int64_t count = 0;
  for (int64_t b = 0; b < num_live; ++b) {
    const int64_t first = blocks[b] * kPlaceBlock;
    for (int64_t i = first; i < first + kPlaceBlock; i += kCount) {
      // The compiler would not know otherwise that higher bits are 0.
      const uint64_t kept = load_mask_bits<kCount>(mask, i) & ((uint64_t{1} << kCount) - 1);
      compress(places + count, numbers_from(i), kept);
      count += __builtin_popcountll(kept);
    }
  }
  for (int64_t i = n / kPlaceBlock * kPlaceBlock; i < n; ++i) {
    places[count] = static_cast<uint16_t>(i);
    count += mask_bit(mask, i);
  }
  for (int64_t j = 0; j < kLiveAhead; ++j) places[count + j] = places[count == 0 ? 0 : count - 1];
  return count;
}

// Packing whole registers takes less time than moving kept weights one by one, unless few are kept. With wider
// registers these have to be fewer.
inline constexpr int64_t kFewKept = 2 * kNumLanes<uint32_t>;

// The weights [begin, begin + n) of a tensor with compact state, of which num_kept are kept.
template <Rule kRule, DType kDType, int kNumStates, bool kHasMaster, DType kState, typename C>
void update_compact(const Arrays<kDType, kNumStates, kHasMaster, kState> a, const uint8_t* mask, int64_t n,
                    int64_t num_kept, const C c) {
  using T = ComputeOf<kDType>;
  using Bits = KeyOf<kDType>;
  using MasterBits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr int64_t kTile = 256, kLanes = kLanesOf<T>, kLine = 64 / sizeof(Bits), kTileAhead = kPackAhead * kLine;
  alignas(64) Bits w[kTile + kLine], g[kTile + kLine];
  alignas(64) MasterBits m[kTile + kLine];
  // Weights, gradients and masters of a tile, packed, with the state that belongs to them.
  auto packed = a;
  packed.weights = w;
  packed.grads = g;
  packed.master = reinterpret_cast<T*>(m);

  const auto update_packed = [&](int64_t count) {
    for (int64_t j = 0; j < count; j += kLanes) {
      if (count - j >= kLanes) {
        update_block<kRule, false>(packed.at(j), 0, c);
      } else {
        update_partial<kRule, false>(packed.at(j), 0, count - j, c);
      }
    }
    packed.advance_state(count);
  };

  uint16_t blocks[kChunk / kPlaceBlock + kListSlack];
  const int64_t num_blocks = n / kPlaceBlock, num_live = live_blocks<kPlaceBlock>(mask, num_blocks, blocks);
  if (num_kept <= n / kFewKept || !walks_all(num_live, num_blocks)) {
    uint16_t places[kChunk / 2 + kPlaceBlock + kListSlack];
    const int64_t count = kept_places(mask, n, blocks, num_live, places);
    for (int64_t j = 0; j < kLiveAhead && j < count; ++j) a.template fetch_weight<kIntoL2>(places[j]);
    for (int64_t first = 0; first < count; first += kTile) {
      const int64_t size = count - first < kTile ? count - first : kTile;
      for (int64_t j = 0; j < size; ++j) {
        const int64_t i = places[first + j];
        a.template fetch_weight<kIntoL2>(places[first + j + kLiveAhead]);
        g[j] = load_one(a.grads + i);
        if constexpr (kHasMaster) {
          __builtin_memcpy(m + j, a.master + i, sizeof(T));
        } else {
          w[j] = load_one(a.weights + i);
        }
      }
      update_packed(size);
      for (int64_t j = 0; j < size; ++j) {
        const int64_t i = places[first + j];
        if constexpr (kHasMaster) __builtin_memcpy(a.master + i, m + j, sizeof(T));
        __builtin_memcpy(a.weights + i, w + j, sizeof(Bits));
      }
    }
    return;
  }

  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t size = n - i < kTile ? n - i : kTile;
    for (int64_t j = i; j < i + size; j += kLine) a.template fetch_weight<kIntoL2>(j + kTileAhead);
    const int64_t count = pack<Bits>(a.grads + i, mask + i / 8, size, g);
    if constexpr (kHasMaster) {
      pack<MasterBits>(a.master + i, mask + i / 8, size, m);
    } else {
      pack<Bits>(a.weights + i, mask + i / 8, size, w);
    }
    update_packed(count);
    if constexpr (kHasMaster) unpack<MasterBits>(m, mask + i / 8, size, a.master + i);
    unpack<Bits>(w, mask + i / 8, size, a.weights + i);
  }
}

// The same with dense state and, if not kMasked, without a mask.
template <Rule kRule, bool kMasked, DType kDType, int kNumStates, bool kHasMaster, DType kState, typename C>
void update_dense(const Arrays<kDType, kNumStates, kHasMaster, kState> a, const uint8_t* mask, int64_t n, const C c) {
  constexpr int kLanes = kLanesOf<ComputeOf<kDType>>;
  const int64_t num_blocks = n / kLanes, rest = n % kLanes;
  uint16_t blocks[kMasked ? kMostBlocks + kListSlack : 1];
  int64_t num_live = num_blocks;
  if constexpr (kMasked) num_live = live_blocks<kLanes>(mask, num_blocks, blocks);
  // An average still holds what was in blocks that are pruned by now; in all other rules they are zero already.
  constexpr bool kSkips = kRule != Rule::average;
  if (!kSkips || walks_all(num_live, num_blocks)) {
    for (int64_t i = 0; i < num_blocks * kLanes; i += kLanes) {
      a.template fetch<kIntoL1>(i + kAhead * kLanes);
      uint64_t bits = 0;
      if constexpr (kMasked) {
        bits = load_mask_bits<kLanes>(mask, i);
        if (kSkips && bits == 0) continue;
      }
      update_block<kRule, kMasked>(a.at(i), bits, c);
    }
  } else if constexpr (kMasked) {
    for (int64_t b = 0; b < num_live; ++b) {
      a.template fetch<kIntoL2>(blocks[b + kLiveAhead < num_live ? b + kLiveAhead : b] * kLanes);
      const int64_t i = blocks[b] * kLanes;
      update_block<kRule, kMasked>(a.at(i), load_mask_bits<kLanes>(mask, i), c);
    }
  }
  if (rest > 0) {
    uint64_t bits = 0;
    if constexpr (kMasked) __builtin_memcpy(&bits, mask + num_blocks * kLanes / 8, (rest + 7) / 8);
    update_partial<kRule, kMasked>(a.at(num_blocks * kLanes), bits, rest, c);
  }
}

// Calls visit(constants) with constants whose parts the compiler knows, where they are those of nearly all steps. A
// loop that has to ask for them takes up to 1.6 times as long: compilers leave the questions in it.
template <Rule kRule, typename T, typename Visit>
void with_parts(const UpdateConstants<T>& c, Visit visit) {
  const bool is_coupled = c.uses(Part::coupled);
  if (c.uses(Part::first) || c.uses(Part::nesterov) || c.uses(Part::far) || (is_coupled && kRule != Rule::sgd)) {
    visit(c);
  } else if (is_coupled) {
    if constexpr (kRule == Rule::sgd) visit(Specialized<T, Part::coupled>(c));
  } else {
    visit(Specialized<T>(c));
  }
}

template <Rule kRule, DType kDType, int kNumStates = kFewestStates<kRule>, bool kHasMaster = false,
          DType kState = kComputeDType<kDType>>
void update(const UpdateTensor& t, int64_t begin, int64_t end, const UpdateConstants<double>& given) {
  if constexpr (kNumStates < kMostStates<kRule>) {
    if (t.num_states > kNumStates) return update<kRule, kDType, kNumStates + 1>(t, begin, end, given);
  }
  if constexpr (!kHasMaster && sizeof(KeyOf<kDType>) < sizeof(ComputeOf<kDType>)) {
    if (t.master != nullptr) return update<kRule, kDType, kNumStates, true>(t, begin, end, given);
  }
  if constexpr (kNumStates > 0 && kState == DType::float32) {
    constexpr DType kHalf = DType::bfloat16;
    if (t.state_dtype == kHalf) return update<kRule, kDType, kNumStates, kHasMaster, kHalf>(t, begin, end, given);
  }
  const Arrays<kDType, kNumStates, kHasMaster, kState> arrays(t, begin);
  const uint8_t* const mask = t.mask + (t.mask == nullptr ? 0 : begin / 8);
  with_parts<kRule>(given.as<ComputeOf<kDType>>(), [&](const auto& c) {
    if (mask == nullptr) {
      update_dense<kRule, false>(arrays, mask, end - begin, c);
    } else if (t.chunk_offsets == nullptr) {
      update_dense<kRule, true>(arrays, mask, end - begin, c);
    } else {
      const int64_t* const offset = t.chunk_offsets + begin / kChunk;
      update_compact<kRule>(arrays, mask, end - begin, offset[1] - offset[0], c);
    }
  });
}

// Sum of the squares of the kept gradients, in double and in an order that depends only on their number.
template <DType kDType>
double sum_squares(const LayerView& layer, int64_t begin, int64_t end) {
  using T = ComputeOf<kDType>;
  using Bits = KeyOf<kDType>;
  constexpr int64_t kLanes = kLanesOf<T>;
  const Bits* const grads = static_cast<const Bits*>(layer.weights);
  Doubles total[kLanesOf<double> / kWidthOf<double>] = {};
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t size = end - i < kLanes ? end - i : kLanes;
    uint64_t bits = ~uint64_t{0};
    if (layer.mask != nullptr) {
      bits = 0;
      __builtin_memcpy(&bits, layer.mask + i / 8, (size + 7) / 8);
      if (bits == 0) continue;
    }
    Bits block[kLanes] = {};
    prefetch_ahead(grads + i);
    __builtin_memcpy(block, grads + i, size * sizeof(Bits));
    T values[kLanes];
    for (int part = 0; part < kLanes; part += kWidthOf<T>) {
      store_vector(values + part, zero_unless<T>(bits >> part, load_weights<kDType>(block + part)));
    }
    for (int part = 0; part < kLanes; part += kWidthOf<double>) {
      Doubles wide;
      for (int j = 0; j < kWidthOf<double>; ++j) wide[j] = values[part + j];
      total[part / kWidthOf<double> % std::size(total)] += wide * wide;
    }
  }
  double sum = 0;
  for (const Doubles& part : total) {
    for (int j = 0; j < kWidthOf<double>; ++j) sum += part[j];
  }
  return sum;
}
