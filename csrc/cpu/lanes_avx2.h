#include "shuffles.h"

constexpr Shuffles<uint8_t, 8, 2> kShuffle16;   // bytes of eight 16-bit lanes
constexpr Shuffles<uint8_t, 8, 1> kShuffle32;   // eight 32-bit lanes
constexpr Shuffles<uint32_t, 4, 2> kShuffle64;  // 32-bit halves of four 64-bit lanes

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store256(void* p, __m256i r) { _mm256_storeu_si256(static_cast<__m256i*>(p), r); }

// All ones in every lane whose bit is set.
inline __m256i chosen16(uint64_t bits) {
  const __m256i select =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits)), select), select);
}
inline __m256i chosen32(uint64_t bits) {
  const __m256i select = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), select), select);
}
inline __m256i chosen64(uint64_t bits) {
  const __m256i select = _mm256_setr_epi64x(1, 2, 4, 8);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<long long>(bits)), select), select);
}

// Registers of keys of 16 and 32 bits, and what is alike for both.
#define GMP_LANES(bits)                                                                                             \
  typedef uint##bits##_t Keys##bits __attribute__((vector_size(32)));                                               \
  inline Keys##bits broadcast(uint##bits##_t key) { return key - Keys##bits{}; }                                    \
  inline Keys##bits load_lanes(const uint##bits##_t* p) { return (Keys##bits)load256(p); }                          \
  inline void store_lanes(uint##bits##_t* p, Keys##bits r) { store256(p, (__m256i)r); }                             \
  inline Keys##bits magnitude(Keys##bits r) { return r & ~broadcast(kSignBit<uint##bits##_t>); }                    \
  inline Keys##bits min(Keys##bits a, Keys##bits b) {                                                               \
    return (Keys##bits)_mm256_min_epu##bits((__m256i)a, (__m256i)b);                                                \
  }                                                                                                                 \
  inline Keys##bits max(Keys##bits a, Keys##bits b) {                                                               \
    return (Keys##bits)_mm256_max_epu##bits((__m256i)a, (__m256i)b);                                                \
  }                                                                                                                 \
  inline Keys##bits zero_unless(uint64_t bits_set, Keys##bits r) { return r & (Keys##bits)chosen##bits(bits_set); } \
  inline bool any_set(Keys##bits r, uint64_t where) { return !_mm256_testz_si256((__m256i)r, chosen##bits(where)); }
GMP_LANES(16)
GMP_LANES(32)
#undef GMP_LANES

inline uint64_t less(Keys16 a, Keys16 b) {
  const __m256i greater = _mm256_cmpgt_epi16((__m256i)b, (__m256i)a);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(greater), _mm256_extracti128_si256(greater, 1));
  return static_cast<unsigned>(_mm_movemask_epi8(bytes));
}
inline void compress(uint16_t* out, Keys16 r, uint64_t bits) {
  const unsigned low = bits & 0xff, high = bits >> 8 & 0xff;
  const auto front = [](__m128i half, unsigned pattern) {
    return _mm_shuffle_epi8(half, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle16.compress[pattern])));
  };
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), front(_mm256_castsi256_si128((__m256i)r), low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + __builtin_popcount(low)),
                   front(_mm256_extracti128_si256((__m256i)r, 1), high));
}
template <>
inline constexpr bool kIsCompressSlow<Keys16> = true;
inline Keys16 expand(const uint16_t* src, uint64_t bits) {
  const unsigned low = bits & 0xff, high = bits >> 8 & 0xff;
  const auto spread = [](const uint16_t* p, unsigned pattern) {
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffle16.expand[pattern])));
  };
  return (Keys16)_mm256_set_m128i(spread(src + __builtin_popcount(low), high), spread(src, low));
}

inline uint64_t less(Keys32 a, Keys32 b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32((__m256i)b, (__m256i)a))));
}
// Bytes in the table, because words would fill half of L1.
inline __m256i indices32(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void compress(uint32_t* out, Keys32 r, uint64_t bits) {
  store256(out, _mm256_permutevar8x32_epi32((__m256i)r, indices32(kShuffle32.compress[bits & 0xff])));
}
inline Keys32 expand(const uint32_t* src, uint64_t bits) {
  const __m256i indices = indices32(kShuffle32.expand[bits & 0xff]);
  return zero_unless(bits, (Keys32)_mm256_permutevar8x32_epi32(load256(src), indices));
}

// Two registers, so that lanes of every width cover whole bytes of the mask.
struct Keys64 {
  __m256i low, high;
};

inline Keys64 broadcast(uint64_t key) {
  const __m256i r = _mm256_set1_epi64x(static_cast<long long>(key));
  return {r, r};
}
inline Keys64 operator+(Keys64 a, Keys64 b) {
  return {_mm256_add_epi64(a.low, b.low), _mm256_add_epi64(a.high, b.high)};
}
inline Keys64 load_lanes(const uint64_t* p) { return {load256(p), load256(p + 4)}; }
inline void store_lanes(uint64_t* p, Keys64 r) {
  store256(p, r.low);
  store256(p + 4, r.high);
}
inline Keys64 magnitude(Keys64 r) {
  const __m256i unsigned_bits = _mm256_set1_epi64x(0x7fffffffffffffff);
  return {_mm256_and_si256(r.low, unsigned_bits), _mm256_and_si256(r.high, unsigned_bits)};
}
inline Keys64 min(Keys64 a, Keys64 b) {
  return {_mm256_blendv_epi8(a.low, b.low, _mm256_cmpgt_epi64(a.low, b.low)),
          _mm256_blendv_epi8(a.high, b.high, _mm256_cmpgt_epi64(a.high, b.high))};
}
inline Keys64 max(Keys64 a, Keys64 b) {
  return {_mm256_blendv_epi8(b.low, a.low, _mm256_cmpgt_epi64(a.low, b.low)),
          _mm256_blendv_epi8(b.high, a.high, _mm256_cmpgt_epi64(a.high, b.high))};
}
inline Keys64 zero_unless(uint64_t bits, Keys64 r) {
  return {_mm256_and_si256(r.low, chosen64(bits)), _mm256_and_si256(r.high, chosen64(bits >> 4))};
}
inline uint64_t less(Keys64 a, Keys64 b) {
  const auto bits = [](__m256i x, __m256i y) {
    return static_cast<unsigned>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(y, x))));
  };
  return bits(a.low, b.low) | bits(a.high, b.high) << 4;
}
inline bool any_set(Keys64 r, uint64_t where) {
  return !_mm256_testz_si256(r.low, chosen64(where)) || !_mm256_testz_si256(r.high, chosen64(where >> 4));
}
inline void compress(uint64_t* out, Keys64 r, uint64_t bits) {
  const unsigned low = bits & 0xf, high = bits >> 4 & 0xf;
  store256(out, _mm256_permutevar8x32_epi32(r.low, load256(kShuffle64.compress[low])));
  store256(out + __builtin_popcount(low), _mm256_permutevar8x32_epi32(r.high, load256(kShuffle64.compress[high])));
}
inline Keys64 expand(const uint64_t* src, uint64_t bits) {
  const unsigned low = bits & 0xf, high = bits >> 4 & 0xf;
  const auto spread = [](const uint64_t* p, unsigned pattern) {
    return _mm256_permutevar8x32_epi32(load256(p), load256(kShuffle64.expand[pattern]));
  };
  return zero_unless(bits, {spread(src, low), spread(src + __builtin_popcount(low), high)});
}

template <typename Key>
using Lanes = std::conditional_t<
    sizeof(Key) == 2, Keys16,
    std::conditional_t<sizeof(Key) == 4, Keys32, std::conditional_t<sizeof(Key) == 8, Keys64, PlainLanes<Key>>>>;
