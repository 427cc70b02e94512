// Places of lanes for a shuffle, by the bits of the lanes that are chosen. `compress` moves those to the front;
// `expand` is its inverse, and gives the bytes of unchosen 16-bit lanes 0x80, which the byte shuffle turns into zeros.
template <typename Index, int kLanes, int kIndicesPerLane>
struct Shuffles {
  alignas(32) Index compress[1 << kLanes][kLanes * kIndicesPerLane];
  alignas(32) Index expand[1 << kLanes][kLanes * kIndicesPerLane];

  constexpr Shuffles() : compress(), expand() {
    for (int bits = 0; bits < 1 << kLanes; ++bits) {
      int rank = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const bool chosen = bits >> lane & 1;
        for (int part = 0; part < kIndicesPerLane; ++part) {
          const int own = lane * kIndicesPerLane + part, moved = rank * kIndicesPerLane + part;
          if (chosen) compress[bits][moved] = static_cast<Index>(own);
          expand[bits][own] = chosen ? static_cast<Index>(moved) : static_cast<Index>(0x80);
        }
        rank += chosen;
      }
    }
  }
};

constexpr Shuffles<uint8_t, 8, 2> kShuffle16;   // bytes of eight 16-bit lanes
constexpr Shuffles<uint32_t, 8, 1> kShuffle32;  // eight 32-bit lanes
constexpr Shuffles<uint32_t, 4, 2> kShuffle64;  // 32-bit halves of four 64-bit lanes

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i r) { _mm256_storeu_si256(static_cast<__m256i*>(p), r); }

// All ones in every lane whose bit is set.
inline __m256i expand16(uint64_t bits) {
  const __m256i select =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits)), select), select);
}
inline __m256i expand32(uint64_t bits) {
  const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), select), select);
}
inline __m256i expand64(uint64_t bits) {
  const __m256i select = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), select), select);
}

#include "lanes.h"

template <>
struct Lanes<uint16_t> {
  static constexpr int kCount = 16;
  static constexpr uint64_t kAll = 0xffff;
  using Reg = __m256i;
  static Reg broadcast(uint16_t key) { return _mm256_set1_epi16(static_cast<short>(key)); }
  static Reg load(const uint16_t* p) { return load256(p); }
  static void store(uint16_t* p, Reg r) { store256(p, r); }
  static Reg magnitude(Reg r) { return _mm256_and_si256(r, _mm256_set1_epi16(0x7fff)); }
  static Reg min(Reg a, Reg b) { return _mm256_min_epu16(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_epu16(a, b); }
  static Reg zero_unless(uint64_t bits, Reg r) { return _mm256_and_si256(r, expand16(bits)); }
  static uint64_t less(Reg a, Reg b) {
    const Reg greater = _mm256_cmpgt_epi16(b, a);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(greater), _mm256_extracti128_si256(greater, 1));
    return static_cast<unsigned>(_mm_movemask_epi8(bytes));
  }
  static bool any_set(Reg r, uint64_t where) { return !_mm256_testz_si256(r, expand16(where)); }
  static void compress(uint16_t* out, Reg r, uint64_t bits) {
    const unsigned low = bits & 0xff, high = bits >> 8 & 0xff;
    const auto front = [](__m128i half, unsigned pattern) {
      return _mm_shuffle_epi8(half, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle16.compress[pattern])));
    };
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), front(_mm256_castsi256_si128(r), low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + __builtin_popcount(low)),
                     front(_mm256_extracti128_si256(r, 1), high));
  }
  static Reg expand(const uint16_t* src, uint64_t bits) {
    const unsigned low = bits & 0xff, high = bits >> 8 & 0xff;
    const auto spread = [](const uint16_t* p, unsigned pattern) {
      return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                              _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle16.expand[pattern])));
    };
    return _mm256_set_m128i(spread(src + __builtin_popcount(low), high), spread(src, low));
  }
};

template <>
struct Lanes<uint32_t> {
  static constexpr int kCount = 8;
  static constexpr uint64_t kAll = 0xff;
  using Reg = __m256i;
  static Reg broadcast(uint32_t key) { return _mm256_set1_epi32(static_cast<int>(key)); }
  static Reg load(const uint32_t* p) { return load256(p); }
  static void store(uint32_t* p, Reg r) { store256(p, r); }
  static Reg magnitude(Reg r) { return _mm256_and_si256(r, _mm256_set1_epi32(0x7fffffff)); }
  static Reg min(Reg a, Reg b) { return _mm256_min_epu32(a, b); }
  static Reg max(Reg a, Reg b) { return _mm256_max_epu32(a, b); }
  static Reg zero_unless(uint64_t bits, Reg r) { return _mm256_and_si256(r, expand32(bits)); }
  static uint64_t less(Reg a, Reg b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a))));
  }
  static bool any_set(Reg r, uint64_t where) { return !_mm256_testz_si256(r, expand32(where)); }
  static void compress(uint32_t* out, Reg r, uint64_t bits) {
    store256(out, _mm256_permutevar8x32_epi32(r, load256(kShuffle32.compress[bits & 0xff])));
  }
  static Reg expand(const uint32_t* src, uint64_t bits) {
    return zero_unless(bits, _mm256_permutevar8x32_epi32(load256(src), load256(kShuffle32.expand[bits & 0xff])));
  }
};

// Two registers, so that every kind of Lanes covers whole bytes of the mask.
template <>
struct Lanes<uint64_t> {
  static constexpr int kCount = 8;
  static constexpr uint64_t kAll = 0xff;
  struct Reg {
    __m256i low, high;
  };
  static Reg broadcast(uint64_t key) {
    const __m256i r = _mm256_set1_epi64x(static_cast<long long>(key));
    return {r, r};
  }
  static Reg load(const uint64_t* p) { return {load256(p), load256(p + 4)}; }
  static void store(uint64_t* p, Reg r) {
    store256(p, r.low);
    store256(p + 4, r.high);
  }
  static Reg magnitude(Reg r) {
    const __m256i unsigned_bits = _mm256_set1_epi64x(0x7fffffffffffffff);
    return {_mm256_and_si256(r.low, unsigned_bits), _mm256_and_si256(r.high, unsigned_bits)};
  }
  static Reg min(Reg a, Reg b) {
    return {_mm256_blendv_epi8(a.low, b.low, _mm256_cmpgt_epi64(a.low, b.low)),
            _mm256_blendv_epi8(a.high, b.high, _mm256_cmpgt_epi64(a.high, b.high))};
  }
  static Reg max(Reg a, Reg b) {
    return {_mm256_blendv_epi8(b.low, a.low, _mm256_cmpgt_epi64(a.low, b.low)),
            _mm256_blendv_epi8(b.high, a.high, _mm256_cmpgt_epi64(a.high, b.high))};
  }
  static Reg zero_unless(uint64_t bits, Reg r) {
    return {_mm256_and_si256(r.low, expand64(bits)), _mm256_and_si256(r.high, expand64(bits >> 4))};
  }
  static uint64_t less(Reg a, Reg b) {
    const auto bits = [](__m256i x, __m256i y) {
      return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(y, x))));
    };
    return bits(a.low, b.low) | bits(a.high, b.high) << 4;
  }
  static bool any_set(Reg r, uint64_t where) {
    return !_mm256_testz_si256(r.low, expand64(where)) || !_mm256_testz_si256(r.high, expand64(where >> 4));
  }
  static void compress(uint64_t* out, Reg r, uint64_t bits) {
    const unsigned low = bits & 0xf, high = bits >> 4 & 0xf;
    store256(out, _mm256_permutevar8x32_epi32(r.low, load256(kShuffle64.compress[low])));
    store256(out + __builtin_popcount(low), _mm256_permutevar8x32_epi32(r.high, load256(kShuffle64.compress[high])));
  }
  static Reg expand(const uint64_t* src, uint64_t bits) {
    const unsigned low = bits & 0xf, high = bits >> 4 & 0xf;
    const auto spread = [](const uint64_t* p, unsigned pattern) {
      return _mm256_permutevar8x32_epi32(load256(p), load256(kShuffle64.expand[pattern]));
    };
    return zero_unless(bits, {spread(src, low), spread(src + __builtin_popcount(low), high)});
  }
};
