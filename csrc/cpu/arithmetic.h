// Operations of the optimizers' arithmetic that are not operators. Machines with AVX-512 use AVX too, because one of
// their wide divisions or square roots takes twice as long as two narrow ones.
//
// Included inside an anonymous namespace: see kernels_impl.h.

struct Arithmetic {
#if defined(__F16C__) && defined(__FMA__)
  static Floats square_root(Floats v) { return (Floats)_mm256_sqrt_ps((__m256)v); }
  static Doubles square_root(Doubles v) { return (Doubles)_mm256_sqrt_pd((__m256d)v); }

  static Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static Doubles fused(Doubles a, Doubles b, Doubles c) {
    return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }

  static Floats float_from_half(const uint16_t* p) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void half_from_float(uint16_t* p, Floats v) {
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
#else
  static Floats square_root(Floats v) {
    for (int j = 0; j < kWidthOf<float>; ++j) v[j] = __builtin_sqrtf(v[j]);
    return v;
  }
  static Doubles square_root(Doubles v) {
    for (int j = 0; j < kWidthOf<double>; ++j) v[j] = __builtin_sqrt(v[j]);
    return v;
  }

  static Floats fused(Floats a, Floats b, Floats c) {
    for (int j = 0; j < kWidthOf<float>; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
    return c;
  }
  static Doubles fused(Doubles a, Doubles b, Doubles c) {
    for (int j = 0; j < kWidthOf<double>; ++j) c[j] = __builtin_fma(a[j], b[j], c[j]);
    return c;
  }

  static Floats float_from_half(const uint16_t* p) {
    Floats v;
    for (int j = 0; j < kWidthOf<float>; ++j) {
      _Float16 half;
      __builtin_memcpy(&half, p + j, sizeof(half));
      v[j] = static_cast<float>(half);
    }
    return v;
  }
  static void half_from_float(uint16_t* p, Floats v) {
    for (int j = 0; j < kWidthOf<float>; ++j) {
      const _Float16 half = static_cast<_Float16>(v[j]);
      __builtin_memcpy(p + j, &half, sizeof(half));
    }
  }
#endif
};
