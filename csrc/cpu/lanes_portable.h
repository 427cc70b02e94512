#include "lanes.h"

// What the optimizers' arithmetic needs beyond operators.
struct Arithmetic {
  static Vec<float> square_root(Vec<float> v) {
    for (int j = 0; j < kWidthOf<float>; ++j) v[j] = __builtin_sqrtf(v[j]);
    return v;
  }
  static Vec<double> square_root(Vec<double> v) {
    for (int j = 0; j < kWidthOf<double>; ++j) v[j] = __builtin_sqrt(v[j]);
    return v;
  }

  static Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
    for (int j = 0; j < kWidthOf<float>; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return c;
  }
  static Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
    for (int j = 0; j < kWidthOf<double>; ++j) c[j] = __builtin_fma(a[j], b[j], c[j]);
    return c;
  }

  static Vec<float> float_from_half(const uint16_t* p) {
    Vec<float> v;
    for (int j = 0; j < kWidthOf<float>; ++j) {
      _Float16 half;
      __builtin_memcpy(&half, p + j, sizeof(half));
      v[j] = static_cast<float>(half);
    }
    return v;
  }
  static void half_from_float(uint16_t* p, Vec<float> v) {
    for (int j = 0; j < kWidthOf<float>; ++j) {
      const _Float16 half = static_cast<_Float16>(v[j]);
      __builtin_memcpy(p + j, &half, sizeof(half));
    }
  }
};
