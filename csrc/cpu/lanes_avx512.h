// Compressing goes through a register: the form of vpcompress that writes memory is microcoded on Zen 4.
#include "lanes.h"

template <>
struct Lanes<uint16_t> {
  static constexpr int kCount = 32;
  static constexpr uint64_t kAll = 0xffffffff;
  using Reg = __m512i;
  static Reg broadcast(uint16_t key) { return _mm512_set1_epi16(static_cast<short>(key)); }
  static Reg load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint16_t* p, Reg r) { _mm512_storeu_si512(p, r); }
  static Reg magnitude(Reg r) { return _mm512_and_si512(r, _mm512_set1_epi16(0x7fff)); }
  static Reg min(Reg a, Reg b) { return _mm512_min_epu16(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_epu16(a, b); }
  static Reg zero_unless(uint64_t bits, Reg r) { return _mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), r); }
  static uint64_t less(Reg a, Reg b) { return _mm512_cmplt_epu16_mask(a, b); }
  static bool any_set(Reg r, uint64_t where) {
    return _mm512_mask_test_epi16_mask(static_cast<__mmask32>(where), r, r) != 0;
  }
  static void compress(uint16_t* out, Reg r, uint64_t bits) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(static_cast<__mmask32>(bits), r));
  }
  static Reg expand(const uint16_t* src, uint64_t bits) {
    return _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), load(src));
  }
};

template <>
struct Lanes<uint32_t> {
  static constexpr int kCount = 16;
  static constexpr uint64_t kAll = 0xffff;
  using Reg = __m512i;
  static Reg broadcast(uint32_t key) { return _mm512_set1_epi32(static_cast<int>(key)); }
  static Reg load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint32_t* p, Reg r) { _mm512_storeu_si512(p, r); }
  static Reg magnitude(Reg r) { return _mm512_and_si512(r, _mm512_set1_epi32(0x7fffffff)); }
  static Reg min(Reg a, Reg b) { return _mm512_min_epu32(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_epu32(a, b); }
  static Reg zero_unless(uint64_t bits, Reg r) { return _mm512_maskz_mov_epi32(static_cast<__mmask16>(bits), r); }
  static uint64_t less(Reg a, Reg b) { return _mm512_cmplt_epu32_mask(a, b); }
  static bool any_set(Reg r, uint64_t where) {
    return _mm512_mask_test_epi32_mask(static_cast<__mmask16>(where), r, r) != 0;
  }
  static void compress(uint32_t* out, Reg r, uint64_t bits) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), r));
  }
  static Reg expand(const uint32_t* src, uint64_t bits) {
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(bits), load(src));
  }
};

template <>
struct Lanes<uint64_t> {
  static constexpr int kCount = 8;
  static constexpr uint64_t kAll = 0xff;
  using Reg = __m512i;
  static Reg broadcast(uint64_t key) { return _mm512_set1_epi64(static_cast<long long>(key)); }
  static Reg load(const uint64_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint64_t* p, Reg r) { _mm512_storeu_si512(p, r); }
  static Reg magnitude(Reg r) { return _mm512_and_si512(r, _mm512_set1_epi64(0x7fffffffffffffff)); }
  static Reg min(Reg a, Reg b) { return _mm512_min_epu64(a, b); }
  static Reg max(Reg a, Reg b) { return _mm512_max_epu64(a, b); }
  static Reg zero_unless(uint64_t bits, Reg r) { return _mm512_maskz_mov_epi64(static_cast<__mmask8>(bits), r); }
  static uint64_t less(Reg a, Reg b) { return _mm512_cmplt_epu64_mask(a, b); }
  static bool any_set(Reg r, uint64_t where) {
    return _mm512_mask_test_epi64_mask(static_cast<__mmask8>(where), r, r) != 0;
  }
  static void compress(uint64_t* out, Reg r, uint64_t bits) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi64(static_cast<__mmask8>(bits), r));
  }
  static Reg expand(const uint64_t* src, uint64_t bits) {
    return _mm512_maskz_expand_epi64(static_cast<__mmask8>(bits), load(src));
  }
};
