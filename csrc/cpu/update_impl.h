// The optimizer step, written once over vectors of 32 bytes that the compiler splits to what the machine has; memory is
// walked in blocks of two.
//
// Included by each instruction set's translation unit inside its anonymous namespace, after Lanes and Arithmetic.
// Products and sums are never contracted (-ffp-contract=off) and every operation is exactly rounded, so all instruction
// sets and all numbers of threads give the same bits. The order of operations is that of torch.optim's single-tensor
// loops.
//
// A pruned weight costs nothing: blocks whose mask bits are all zero are skipped (what they hold is zero already), and
// with compact state the kept weights and gradients of a tile are first packed together, so that the arithmetic runs on
// kept weights only and the state is read in one piece.

// How weights of a dtype become vectors and vectors weights: floats and doubles are stored as they are computed.
template <DType kDType>
struct FormatOf {
  using Bits = KeyOf<kDType>;
  using Compute = ComputeOf<kDType>;
  static_assert(sizeof(Bits) == sizeof(Compute), "this dtype needs conversions");
  static Vec<Compute> load(const Bits* p) {
    Vec<Compute> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(Bits* p, Vec<Compute> v) { __builtin_memcpy(p, &v, sizeof(v)); }
};

template <>
struct FormatOf<DType::bfloat16> {
  using Bits = KeyOf<DType::bfloat16>;
  using Compute = float;
  static Vec<float> load(const Bits* p) {
    HalfBits half;
    __builtin_memcpy(&half, p, sizeof(half));
    return (Vec<float>)(__builtin_convertvector(half, FloatBits) << 16);
  }
  // Round to nearest even; NaN becomes the quiet NaN torch writes.
  static void store(Bits* p, Vec<float> v) {
    const FloatBits bits = (FloatBits)v;
    const FloatBits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const FloatBits is_nan = (FloatBits)((bits & 0x7fffffff) > 0x7f800000);
    const HalfBits half = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), HalfBits);
    __builtin_memcpy(p, &half, sizeof(half));
  }
};

template <>
struct FormatOf<DType::float16> {
  using Bits = KeyOf<DType::float16>;
  using Compute = float;
  static Vec<float> load(const Bits* p) { return Arithmetic::float_from_half(p); }
  static void store(Bits* p, Vec<float> v) { Arithmetic::half_from_float(p, v); }
};

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

// All ones in the lanes whose bit is set.
template <typename T>
inline typename VectorOf<T>::Mask lanes_of_bits(uint64_t bits) {
  using Mask = typename VectorOf<T>::Mask;
  Mask lane;
  for (int j = 0; j < kWidthOf<T>; ++j) lane[j] = 1 << j;
  return (static_cast<int32_t>(bits) & lane) != 0;
}
template <typename T>
inline Vec<T> zero_unless(uint64_t bits, Vec<T> v) {
  return (Vec<T>)((typename VectorOf<T>::Mask)v & lanes_of_bits<T>(bits));
}

// The arrays of a tensor, at one of its weights. How many of them there are is known to the compiler, so that no block
// asks.
template <typename Format, int kNumStates, bool kHasMaster>
struct Arrays {
  using T = typename Format::Compute;
  using Bits = typename Format::Bits;
  Bits* weights;
  const Bits* grads;
  T* master;
  T* state[kMaxStates] = {};

  explicit Arrays(const UpdateTensor& t)
      : weights(static_cast<Bits*>(t.weights)),
        grads(static_cast<const Bits*>(t.grads)),
        master(static_cast<T*>(t.master)) {
    for (int k = 0; k < kNumStates; ++k) state[k] = static_cast<T*>(t.state[k]);
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
  // always_inline, or else GCC finds that it has no effect, and drops it.
  __attribute__((always_inline)) void fetch(int64_t i) const {
    __builtin_prefetch(grads + i);
    __builtin_prefetch(weights + i, 1);
    if constexpr (kHasMaster) __builtin_prefetch(master + i, 1);
    for (int k = 0; k < kNumStates; ++k) __builtin_prefetch(state[k] + i, 1);
  }
};

// One block of weights, gradients and state in memory; `bits`: lanes that are kept.
template <Rule kRule, bool kMasked, typename Format, int kNumStates, bool kHasMaster>
inline void update_block(const Arrays<Format, kNumStates, kHasMaster>& a, uint64_t bits,
                         const UpdateConstants<typename Format::Compute>& c) {
  using T = typename Format::Compute;
  for (int i = 0; i < kLanesOf<T>; i += kWidthOf<T>) {
    Vec<T> w, s[kMaxStates] = {};
    if constexpr (kHasMaster) {
      w = load_vector(a.master + i);
    } else {
      w = Format::load(a.weights + i);
    }
    for (int k = 0; k < kNumStates; ++k) s[k] = load_vector(a.state[k] + i);
    update_one<kRule, Arithmetic>(w, Format::load(a.grads + i), s, kNumStates, c);
    if constexpr (kMasked) {
      w = zero_unless<T>(bits >> i, w);
      for (Vec<T>& v : s) v = zero_unless<T>(bits >> i, v);
    }
    for (int k = 0; k < kNumStates; ++k) store_vector(a.state[k] + i, s[k]);
    if constexpr (kHasMaster) store_vector(a.master + i, w);
    Format::store(a.weights + i, w);
  }
}

// The same for fewer than a block, through copies padded with zeros.
template <Rule kRule, bool kMasked, typename Format, int kNumStates, bool kHasMaster>
void update_partial(const Arrays<Format, kNumStates, kHasMaster>& a, uint64_t bits, int64_t n,
                    const UpdateConstants<typename Format::Compute>& c) {
  using T = typename Format::Compute;
  using Bits = typename Format::Bits;
  constexpr int kLanes = kLanesOf<T>;
  Bits w[kLanes] = {}, g[kLanes] = {};
  T m[kLanes] = {}, s[kMaxStates][kLanes] = {};
  __builtin_memcpy(w, a.weights, n * sizeof(Bits));
  __builtin_memcpy(g, a.grads, n * sizeof(Bits));
  if constexpr (kHasMaster) __builtin_memcpy(m, a.master, n * sizeof(T));
  for (int k = 0; k < kNumStates; ++k) __builtin_memcpy(s[k], a.state[k], n * sizeof(T));
  Arrays<Format, kNumStates, kHasMaster> copies = a;
  copies.weights = w;
  copies.grads = g;
  copies.master = m;
  for (int k = 0; k < kNumStates; ++k) copies.state[k] = s[k];
  update_block<kRule, kMasked>(copies, bits, c);
  __builtin_memcpy(a.weights, w, n * sizeof(Bits));
  if constexpr (kHasMaster) __builtin_memcpy(a.master, m, n * sizeof(T));
  for (int k = 0; k < kNumStates; ++k) __builtin_memcpy(a.state[k], s[k], n * sizeof(T));
}

// Moves the kept keys of src to the front of dst, in order; dst has room for a vector more. Returns how many.
template <typename Key>
int64_t pack(const Key* src, const uint8_t* mask, int64_t n, Key* dst) {
  using V = Lanes<Key>;
  int64_t count = 0, i = 0;
  for (; i + V::kCount <= n; i += V::kCount) {
    const uint64_t kept = load_mask_bits<V::kCount>(mask, i);
    V::compress(dst + count, V::load(src + i), kept);
    count += __builtin_popcountll(kept);
  }
  for (; i < n; ++i) {
    if (mask_bit(mask, i)) dst[count++] = load_one(src + i);
  }
  return count;
}

// Its inverse: the kept places of dst get the keys of src in order, the pruned ones zero. src may be read for a vector
// more.
template <typename Key>
void unpack(const Key* src, const uint8_t* mask, int64_t n, Key* dst) {
  using V = Lanes<Key>;
  int64_t i = 0;
  for (; i + V::kCount <= n; i += V::kCount) {
    const uint64_t kept = load_mask_bits<V::kCount>(mask, i);
    V::store(dst + i, V::expand(src, kept));
    src += __builtin_popcountll(kept);
  }
  for (; i < n; ++i) {
    const Key key = mask_bit(mask, i) ? *src++ : Key{0};
    __builtin_memcpy(dst + i, &key, sizeof(Key));
  }
}

// The blocks of kLanes weights, up to kMostBlocks of them, in which anything is kept. Collected ahead of the work,
// without a branch: at 95 % every other block is dead, in no order a predictor could learn, and what comes next must be
// known to be fetched early, since the hardware only fetches ahead of even strides.
inline constexpr int64_t kMostBlocks = 2048;

template <int kLanes>
int64_t live_blocks(const uint8_t* mask, int64_t num_blocks, uint16_t* blocks) {
  int64_t count = 0;
  for (int64_t b = 0; b < num_blocks; ++b) {
    blocks[count] = static_cast<uint16_t>(b);
    count += load_mask_bits<kLanes>(mask, b * kLanes) != 0;
  }
  return count;
}

// How many blocks ahead memory is asked for: the fewer, the more streams a block has. Hardware prefetchers stop at the
// end of a page, and follow no stream with holes in it.
inline constexpr int64_t kDenseAhead = 32, kCompactAhead = 24;

template <Rule kRule, typename Format, int kNumStates, bool kHasMaster>
void update_compact(const UpdateTensor& t, const UpdateConstants<typename Format::Compute> c) {
  using T = typename Format::Compute;
  using Bits = typename Format::Bits;
  using MasterBits = typename VectorOf<T>::Bits;
  using V = Lanes<Bits>;
  constexpr int64_t kTile = 512, kLanes = kLanesOf<T>, kBlock = V::kCount;
  constexpr int64_t kSlack = 64 / sizeof(Bits), kMasterSlack = 64 / sizeof(MasterBits);
  alignas(64) Bits w[kTile + kSlack] = {}, g[kTile + kSlack] = {};
  alignas(64) MasterBits m[kTile + kMasterSlack] = {};
  uint16_t blocks[kMostBlocks + 1];
  const Arrays<Format, kNumStates, kHasMaster> a(t);
  MasterBits* const master = static_cast<MasterBits*>(t.master);
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

  const int64_t num_blocks = t.n / kBlock;
  const int64_t num_live = live_blocks<V::kCount>(t.mask, num_blocks, blocks);
  for (int64_t first = 0; first < num_live;) {
    int64_t count = 0, last = first;
    for (; last < num_live && count + kBlock <= kTile; ++last) {
      const int64_t i = blocks[last] * kBlock;
      const int64_t ahead = blocks[last + kCompactAhead < num_live ? last + kCompactAhead : last] * kBlock;
      __builtin_prefetch(a.grads + ahead);
      __builtin_prefetch(a.weights + ahead, 1);
      const uint64_t kept = load_mask_bits<V::kCount>(t.mask, i);
      V::compress(g + count, V::load(a.grads + i), kept);
      if constexpr (kHasMaster) {
        __builtin_prefetch(master + ahead, 1);
        pack(master + i, t.mask + i / 8, kBlock, m + count);
      } else {
        V::compress(w + count, V::load(a.weights + i), kept);
      }
      count += __builtin_popcountll(kept);
    }
    update_packed(count);
    int64_t taken = 0;
    for (; first < last; ++first) {
      const int64_t i = blocks[first] * kBlock;
      const uint64_t kept = load_mask_bits<V::kCount>(t.mask, i);
      if constexpr (kHasMaster) unpack(m + taken, t.mask + i / 8, kBlock, master + i);
      V::store(a.weights + i, V::expand(w + taken, kept));
      taken += __builtin_popcountll(kept);
    }
  }

  const int64_t i = num_blocks * kBlock, n = t.n - i;
  if (n == 0) return;
  const uint8_t* const mask = t.mask + i / 8;
  const int64_t count = pack(a.grads + i, mask, n, g);
  if constexpr (kHasMaster) {
    pack(master + i, mask, n, m);
  } else {
    pack(a.weights + i, mask, n, w);
  }
  update_packed(count);
  if constexpr (kHasMaster) unpack(m, mask, n, master + i);
  unpack(w, mask, n, a.weights + i);
}

template <Rule kRule, bool kMasked, typename Format, int kNumStates, bool kHasMaster>
void update_dense(const UpdateTensor& t, const UpdateConstants<typename Format::Compute> c) {
  constexpr int kLanes = kLanesOf<typename Format::Compute>;
  const Arrays<Format, kNumStates, kHasMaster> a(t);
  const int64_t num_blocks = t.n / kLanes, rest = t.n % kLanes;
  uint16_t blocks[kMasked ? kMostBlocks + 1 : 1];
  int64_t num_live = num_blocks;
  if constexpr (kMasked) num_live = live_blocks<kLanes>(t.mask, num_blocks, blocks);
  // Up to one dead block in three, fetching the dead ones as well is faster than leaping over them: uneven strides lose
  // the hardware's prefetchers, and with them more than the lines that are saved.
  if (num_live * 3 > num_blocks * 2) {
    for (int64_t i = 0; i < num_blocks * kLanes; i += kLanes) {
      a.fetch(i + kDenseAhead * kLanes);
      uint64_t bits = 0;
      if constexpr (kMasked) {
        bits = load_mask_bits<kLanes>(t.mask, i);
        if (bits == 0) continue;
      }
      update_block<kRule, kMasked>(a.at(i), bits, c);
    }
  } else if constexpr (kMasked) {
    for (int64_t b = 0; b < num_live; ++b) {
      a.fetch(blocks[b + kDenseAhead < num_live ? b + kDenseAhead : b] * kLanes);
      const int64_t i = blocks[b] * kLanes;
      update_block<kRule, kMasked>(a.at(i), load_mask_bits<kLanes>(t.mask, i), c);
    }
  }
  if (rest > 0) {
    uint64_t bits = 0;
    if constexpr (kMasked) __builtin_memcpy(&bits, t.mask + num_blocks * kLanes / 8, (rest + 7) / 8);
    update_partial<kRule, kMasked>(a.at(num_blocks * kLanes), bits, rest, c);
  }
}

// Sum of the squares of the kept gradients, in double and in an order that depends on n alone.
template <typename Format>
double sum_squares(const UpdateTensor& t) {
  using T = typename Format::Compute;
  using Bits = typename Format::Bits;
  constexpr int64_t kLanes = kLanesOf<T>;
  const Bits* const grads = static_cast<const Bits*>(t.grads);
  Vec<double> total[kLanesOf<double> / kWidthOf<double>] = {};
  for (int64_t i = 0; i < t.n; i += kLanes) {
    const int64_t size = t.n - i < kLanes ? t.n - i : kLanes;
    uint64_t bits = ~uint64_t{0};
    if (t.mask != nullptr) {
      bits = 0;
      __builtin_memcpy(&bits, t.mask + i / 8, (size + 7) / 8);
      if (bits == 0) continue;
    }
    Bits block[kLanes] = {};
    prefetch_ahead(grads + i);
    __builtin_memcpy(block, grads + i, size * sizeof(Bits));
    T values[kLanes];
    for (int part = 0; part < kLanes; part += kWidthOf<T>) {
      store_vector(values + part, zero_unless<T>(bits >> part, Format::load(block + part)));
    }
    for (int part = 0; part < kLanes; part += kWidthOf<double>) {
      Vec<double> wide;
      for (int j = 0; j < kWidthOf<double>; ++j) wide[j] = values[part + j];
      total[part / kWidthOf<double> % 2] += wide * wide;
    }
  }
  double sum = 0;
  for (const Vec<double>& part : total) {
    for (int j = 0; j < kWidthOf<double>; ++j) sum += part[j];
  }
  return sum;
}

template <Rule kRule, typename Format, int kNumStates, bool kHasMaster>
void update_arrays(const UpdateTensor& t, const UpdateConstants<typename Format::Compute>& c) {
  if (t.mask == nullptr) {
    update_dense<kRule, false, Format, kNumStates, kHasMaster>(t, c);
  } else if (t.chunk_offsets == nullptr) {
    update_dense<kRule, true, Format, kNumStates, kHasMaster>(t, c);
  } else {
    update_compact<kRule, Format, kNumStates, kHasMaster>(t, c);
  }
}

template <Rule kRule, typename Format, int kNumStates = kFewestStates<kRule>>
void update(const UpdateTensor& t, const UpdateConstants<double>& given) {
  if constexpr (kNumStates < kMostStates<kRule>) {
    if (t.num_states > kNumStates) return update<kRule, Format, kNumStates + 1>(t, given);
  }
  const auto c = given.as<typename Format::Compute>();
  if constexpr (sizeof(typename Format::Bits) < sizeof(typename Format::Compute)) {
    if (t.master != nullptr) return update_arrays<kRule, Format, kNumStates, true>(t, c);
  }
  update_arrays<kRule, Format, kNumStates, false>(t, c);
}

template <typename Key>
constexpr Kernels<Key> kernels_of() {
  return {scan<Key>, apply<Key>, pack<Key>, unpack<Key>};
}

template <typename Format>
constexpr UpdateKernels update_kernels_of() {
  return {sizeof(typename Format::Bits),
          sizeof(typename Format::Compute),
          {
#define GMP_RULE(name, fewest, most) update<Rule::name, Format>,
              GMP_RULES(GMP_RULE)
#undef GMP_RULE
          },
          sum_squares<Format>};
}

constexpr KernelSet kernel_set(const char* name) {
  return {name, count_bits,
#define GMP_KEY(Key) kernels_of<Key>(),
          GMP_KEYS(GMP_KEY)
#undef GMP_KEY
              {
#define GMP_DTYPE(name, key, infinity) update_kernels_of<FormatOf<DType::name>>(),
                  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
              }};
}
