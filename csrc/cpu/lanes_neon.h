#include "shuffles.h"

// Eight keys of 16, 32 and 64 bits, in one, two and four registers, so that lanes of every width cover whole bytes of
// the mask.
constexpr Shuffles<uint8_t, 8, 2> kShuffle16;  // bytes of eight 16-bit lanes
constexpr Shuffles<uint8_t, 4, 4> kShuffle32;  // of four 32-bit lanes
constexpr Shuffles<uint8_t, 2, 8> kShuffle64;  // of two 64-bit lanes

// Register number `part` of a vector of keys, as bytes.
inline uint8x16_t shuffled(uint8x16_t bytes, const uint8_t* places) { return vqtbl1q_u8(bytes, vld1q_u8(places)); }

// All ones in every lane whose bit is set, and the bits of the lanes that are all ones.
inline uint16x8_t chosen(uint64_t bits, uint16x8_t) {
  const uint16x8_t lane = {1, 2, 4, 8, 16, 32, 64, 128};
  return vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits)), lane);
}
inline uint32x4_t chosen(uint64_t bits, uint32x4_t) {
  const uint32x4_t lane = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits)), lane);
}
inline uint64x2_t chosen(uint64_t bits, uint64x2_t) {
  const uint64x2_t lane = {1, 2};
  return vtstq_u64(vdupq_n_u64(bits), lane);
}
inline uint64_t bits_of(uint16x8_t all_ones) {
  const uint16x8_t lane = {1, 2, 4, 8, 16, 32, 64, 128};
  return vaddvq_u16(all_ones & lane);
}
inline uint64_t bits_of(uint32x4_t all_ones) {
  const uint32x4_t lane = {1, 2, 4, 8};
  return vaddvq_u32(all_ones & lane);
}
inline uint64_t bits_of(uint64x2_t all_ones) {
  const uint64x2_t lane = {1, 2};
  return vaddvq_u64(all_ones & lane);
}

// The operations are written with those of the compiler's vectors where it has them.
template <typename Key, typename Register>
struct NeonLanes {
  static constexpr int kPerRegister = 16 / sizeof(Key), kRegisters = 8 / kPerRegister;
  Register part[kRegisters];
};
template <typename Key, typename Register>
NeonLanes<Key, Register> operator+(NeonLanes<Key, Register> a, NeonLanes<Key, Register> b) {
  for (int j = 0; j < a.kRegisters; ++j) a.part[j] += b.part[j];
  return a;
}
using Keys16 = NeonLanes<uint16_t, uint16x8_t>;
using Keys32 = NeonLanes<uint32_t, uint32x4_t>;
using Keys64 = NeonLanes<uint64_t, uint64x2_t>;

#define GMP_LANES(bits)                                                                                        \
  inline Keys##bits broadcast(uint##bits##_t key) {                                                            \
    Keys##bits r;                                                                                              \
    for (auto& part : r.part) part = vdupq_n_u##bits(key);                                                     \
    return r;                                                                                                  \
  }                                                                                                            \
  inline Keys##bits load_lanes(const uint##bits##_t* p) {                                                      \
    Keys##bits r;                                                                                              \
    __builtin_memcpy(&r, p, sizeof(r));                                                                        \
    return r;                                                                                                  \
  }                                                                                                            \
  inline void store_lanes(uint##bits##_t* p, Keys##bits r) { __builtin_memcpy(p, &r, sizeof(r)); }             \
  inline Keys##bits magnitude(Keys##bits r) {                                                                  \
    for (auto& part : r.part) part &= vdupq_n_u##bits(static_cast<uint##bits##_t>(~kSignBit<uint##bits##_t>)); \
    return r;                                                                                                  \
  }                                                                                                            \
  inline Keys##bits min(Keys##bits a, Keys##bits b) {                                                          \
    for (int j = 0; j < Keys##bits::kRegisters; ++j) {                                                         \
      a.part[j] = vbslq_u##bits(vcltq_u##bits(a.part[j], b.part[j]), a.part[j], b.part[j]);                    \
    }                                                                                                          \
    return a;                                                                                                  \
  }                                                                                                            \
  inline Keys##bits max(Keys##bits a, Keys##bits b) {                                                          \
    for (int j = 0; j < Keys##bits::kRegisters; ++j) {                                                         \
      a.part[j] = vbslq_u##bits(vcgtq_u##bits(a.part[j], b.part[j]), a.part[j], b.part[j]);                    \
    }                                                                                                          \
    return a;                                                                                                  \
  }                                                                                                            \
  inline Keys##bits zero_unless(uint64_t set, Keys##bits r) {                                                  \
    for (auto& part : r.part) {                                                                                \
      part &= chosen(set, part);                                                                               \
      set >>= Keys##bits::kPerRegister;                                                                        \
    }                                                                                                          \
    return r;                                                                                                  \
  }                                                                                                            \
  inline uint64_t less(Keys##bits a, Keys##bits b) {                                                           \
    uint64_t set = 0;                                                                                          \
    for (int j = 0; j < Keys##bits::kRegisters; ++j) {                                                         \
      set |= bits_of(vcltq_u##bits(a.part[j], b.part[j])) << (j * Keys##bits::kPerRegister);                   \
    }                                                                                                          \
    return set;                                                                                                \
  }                                                                                                            \
  inline bool any_set(Keys##bits r, uint64_t where) {                                                          \
    r = zero_unless(where, r);                                                                                 \
    auto any = r.part[0];                                                                                      \
    for (int j = 1; j < Keys##bits::kRegisters; ++j) any |= r.part[j];                                         \
    return vmaxvq_u32(vreinterpretq_u32_u8((uint8x16_t)any)) != 0;                                             \
  }                                                                                                            \
  inline void compress(uint##bits##_t* out, Keys##bits r, uint64_t set) {                                      \
    for (const auto& part : r.part) {                                                                          \
      const uint64_t here = set & ((1u << Keys##bits::kPerRegister) - 1);                                      \
      vst1q_u8(reinterpret_cast<uint8_t*>(out), shuffled((uint8x16_t)part, kShuffle##bits.compress[here]));    \
      out += __builtin_popcountll(here);                                                                       \
      set >>= Keys##bits::kPerRegister;                                                                        \
    }                                                                                                          \
  }                                                                                                            \
  inline Keys##bits expand(const uint##bits##_t* src, uint64_t set) {                                          \
    Keys##bits r;                                                                                              \
    for (auto& part : r.part) {                                                                                \
      const uint64_t here = set & ((1u << Keys##bits::kPerRegister) - 1);                                      \
      const uint8x16_t packed = vld1q_u8(reinterpret_cast<const uint8_t*>(src));                               \
      part = (decltype(+part))shuffled(packed, kShuffle##bits.expand[here]);                                   \
      src += __builtin_popcountll(here);                                                                       \
      set >>= Keys##bits::kPerRegister;                                                                        \
    }                                                                                                          \
    return r;                                                                                                  \
  }
GMP_LANES(16)
GMP_LANES(32)
GMP_LANES(64)
#undef GMP_LANES

template <typename Key>
using Lanes = std::conditional_t<
    sizeof(Key) == 2, Keys16,
    std::conditional_t<sizeof(Key) == 4, Keys32, std::conditional_t<sizeof(Key) == 8, Keys64, PlainLanes<Key>>>>;
