// Registers of keys of 16, 32 and 64 bits. Compressing goes through a register: the form of vpcompress that writes
// memory is microcoded on Zen 4.
#define GMP_LANES(bits, Bits)                                                                                        \
  typedef uint##bits##_t Keys##bits __attribute__((vector_size(64)));                                                \
  inline Keys##bits broadcast(uint##bits##_t key) { return key - Keys##bits{}; }                                     \
  inline Keys##bits load_lanes(const uint##bits##_t* p) { return (Keys##bits)_mm512_loadu_si512(p); }                \
  inline void store_lanes(uint##bits##_t* p, Keys##bits r) { _mm512_storeu_si512(p, (__m512i)r); }                   \
  inline Keys##bits magnitude(Keys##bits r) { return r & ~broadcast(kSignBit<uint##bits##_t>); }                     \
  inline Keys##bits min(Keys##bits a, Keys##bits b) {                                                                \
    return (Keys##bits)_mm512_min_epu##bits((__m512i)a, (__m512i)b);                                                 \
  }                                                                                                                  \
  inline Keys##bits max(Keys##bits a, Keys##bits b) {                                                                \
    return (Keys##bits)_mm512_max_epu##bits((__m512i)a, (__m512i)b);                                                 \
  }                                                                                                                  \
  inline Keys##bits zero_unless(uint64_t chosen, Keys##bits r) {                                                     \
    return (Keys##bits)_mm512_maskz_mov_epi##bits(static_cast<Bits>(chosen), (__m512i)r);                            \
  }                                                                                                                  \
  inline uint64_t less(Keys##bits a, Keys##bits b) { return _mm512_cmplt_epu##bits##_mask((__m512i)a, (__m512i)b); } \
  inline bool any_set(Keys##bits r, uint64_t where) {                                                                \
    return _mm512_mask_test_epi##bits##_mask(static_cast<Bits>(where), (__m512i)r, (__m512i)r) != 0;                 \
  }
GMP_LANES(16, __mmask32)
GMP_LANES(32, __mmask16)
GMP_LANES(64, __mmask8)
#undef GMP_LANES

#define GMP_COMPRESS(bits, Bits)                                                                          \
  inline void compress(uint##bits##_t* out, Keys##bits r, uint64_t chosen) {                              \
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi##bits(static_cast<Bits>(chosen), (__m512i)r));     \
  }                                                                                                       \
  inline Keys##bits expand(const uint##bits##_t* src, uint64_t chosen) {                                  \
    return (Keys##bits)_mm512_maskz_expand_epi##bits(static_cast<Bits>(chosen), _mm512_loadu_si512(src)); \
  }
GMP_COMPRESS(32, __mmask16)
GMP_COMPRESS(64, __mmask8)
#if defined(__AVX512VBMI2__)
GMP_COMPRESS(16, __mmask32)
#else
// Lanes of 16 bits are compressed as two halves of 32-bit lanes, of which the compiler may know the upper to be empty.
inline void compress(uint16_t* out, Keys16 r, uint64_t chosen) {
  const auto front = [](uint16_t* to, __m256i half, __mmask16 bits) {
    const __m512i packed = _mm512_maskz_compress_epi32(bits, _mm512_cvtepu16_epi32(half));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(packed));
  };
  const auto low = static_cast<__mmask16>(chosen), high = static_cast<__mmask16>(chosen >> 16);
  front(out, _mm512_castsi512_si256((__m512i)r), low);
  if (!(__builtin_constant_p(high) && high == 0))
    front(out + __builtin_popcount(low), _mm512_extracti64x4_epi64((__m512i)r, 1), high);
}
template <>
inline constexpr bool kIsCompressSlow<Keys16> = true;
inline Keys16 expand(const uint16_t* src, uint64_t chosen) {
  const auto spread = [](const uint16_t* from, __mmask16 bits) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_cvtepi32_epi16(_mm512_maskz_expand_epi32(bits, _mm512_cvtepu16_epi32(packed)));
  };
  const auto low = static_cast<__mmask16>(chosen), high = static_cast<__mmask16>(chosen >> 16);
  const __m512i first = _mm512_castsi256_si512(spread(src, low));
  return (Keys16)_mm512_inserti64x4(first, spread(src + __builtin_popcount(low), high), 1);
}
#endif
#undef GMP_COMPRESS

template <typename Key>
using Lanes = std::conditional_t<
    sizeof(Key) == 2, Keys16,
    std::conditional_t<sizeof(Key) == 4, Keys32, std::conditional_t<sizeof(Key) == 8, Keys64, PlainLanes<Key>>>>;
