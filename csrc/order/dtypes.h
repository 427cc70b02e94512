// One row per dtype; adding a dtype is adding a row: GMP_DTYPE(name, key type, bits of +Inf).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define GMP_DTYPES(GMP_DTYPE)                         \
  GMP_DTYPE(float32, uint32_t, 0x7f800000u)           \
  GMP_DTYPE(float64, uint64_t, 0x7ff0000000000000ull) \
  GMP_DTYPE(float16, uint16_t, 0x7c00u)               \
  GMP_DTYPE(bfloat16, uint16_t, 0x7f80u)

namespace gmp {

enum class DType : int {
#define GMP_DTYPE(name, key, infinity) name,
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
};

inline uint64_t infinity_of(DType dtype) {
  switch (dtype) {
#define GMP_DTYPE(name, key, infinity) \
  case DType::name:                    \
    return infinity;
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
  __builtin_unreachable();
}

// The magnitude a key stands for; exact, because every dtype here fits in a double. Of float64 it is the double itself:
// arithmetic would lose subnormal ones where the caller has the CPU flush them.
inline double magnitude_of_key(uint64_t key, uint64_t infinity) {
  if (key >= infinity) {
    return key == infinity ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  if (infinity == infinity_of(DType::float64)) {
    double magnitude;
    std::memcpy(&magnitude, &key, sizeof(key));
    return magnitude;
  }
  // +Inf is an all-ones exponent over an empty mantissa: its lowest set bit is the first bit of the exponent, and the
  // exponent field of 1.0 is half its value.
  const int mantissa_bits = __builtin_ctzll(infinity);
  const int bias = static_cast<int>(infinity >> mantissa_bits) / 2;
  const int exponent = static_cast<int>(key >> mantissa_bits);
  const uint64_t fraction = key & ((uint64_t{1} << mantissa_bits) - 1);
  const uint64_t significand = exponent == 0 ? fraction : fraction | (uint64_t{1} << mantissa_bits);
  return std::ldexp(static_cast<double>(significand), (exponent == 0 ? 1 : exponent) - bias - mantissa_bits);
}

// Its inverse for magnitudes that came from a key; in between, the key below. Bisection: once per layer, no rounding.
inline uint64_t key_of_magnitude(double magnitude, uint64_t infinity) {
  if (std::isnan(magnitude)) return infinity + 1;
  if (infinity == infinity_of(DType::float64)) {
    uint64_t key;
    std::memcpy(&key, &magnitude, sizeof(key));
    return key & ~(uint64_t{1} << 63);
  }
  uint64_t low = 0, high = infinity;
  while (low < high) {
    const uint64_t middle = low + (high - low + 1) / 2;
    if (magnitude_of_key(middle, infinity) <= magnitude) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace gmp
