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
  }                                                                                                                  \
  inline void compress(uint##bits##_t* out, Keys##bits r, uint64_t chosen) {                                         \
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi##bits(static_cast<Bits>(chosen), (__m512i)r));                \
  }                                                                                                                  \
  inline Keys##bits expand(const uint##bits##_t* src, uint64_t chosen) {                                             \
    return (Keys##bits)_mm512_maskz_expand_epi##bits(static_cast<Bits>(chosen), _mm512_loadu_si512(src));            \
  }
GMP_LANES(16, __mmask32)
GMP_LANES(32, __mmask16)
GMP_LANES(64, __mmask8)
#undef GMP_LANES

template <typename Key>
using Lanes = std::conditional_t<
    sizeof(Key) == 2, Keys16,
    std::conditional_t<sizeof(Key) == 4, Keys32, std::conditional_t<sizeof(Key) == 8, Keys64, PlainLanes<Key>>>>;
