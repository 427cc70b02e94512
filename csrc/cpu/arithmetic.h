// Operations of the optimizers' arithmetic that are not operators.
//
// Included inside an anonymous namespace: see kernel_set.h.

#if defined(__F16C__) && defined(__FMA__)
inline Floats square_root(Floats v) { return (Floats)_mm256_sqrt_ps((__m256)v); }
inline Doubles square_root(Doubles v) { return (Doubles)_mm256_sqrt_pd((__m256d)v); }

inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}

inline Floats float_from_half(const uint16_t* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void half_from_float(uint16_t* p, Floats v) {
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
#elif defined(GMP_NEON)
inline Floats square_root(Floats v) { return (Floats)vsqrtq_f32((float32x4_t)v); }
inline Doubles square_root(Doubles v) { return (Doubles)vsqrtq_f64((float64x2_t)v); }

inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}

inline Floats float_from_half(const uint16_t* p) { return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline void half_from_float(uint16_t* p, Floats v) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v))); }
#else
inline Floats square_root(Floats v) {
  for (int j = 0; j < kWidthOf<float>; ++j) v[j] = __builtin_sqrtf(v[j]);
  return v;
}
inline Doubles square_root(Doubles v) {
  for (int j = 0; j < kWidthOf<double>; ++j) v[j] = __builtin_sqrt(v[j]);
  return v;
}

inline Floats fused(Floats a, Floats b, Floats c) {
  for (int j = 0; j < kWidthOf<float>; ++j) c[j] = __builtin_fmaf(a[j], b[j], c[j]);
  return c;
}
inline Doubles fused(Doubles a, Doubles b, Doubles c) {
  for (int j = 0; j < kWidthOf<double>; ++j) c[j] = __builtin_fma(a[j], b[j], c[j]);
  return c;
}

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC has the other in C++ from version 13 on
#else
typedef _Float16 Half;
#endif

inline Floats float_from_half(const uint16_t* p) {
  Floats v;
  for (int j = 0; j < kWidthOf<float>; ++j) {
    Half half;
    __builtin_memcpy(&half, p + j, sizeof(half));
    v[j] = static_cast<float>(half);
  }
  return v;
}
inline void half_from_float(uint16_t* p, Floats v) {
  for (int j = 0; j < kWidthOf<float>; ++j) {
    const Half half = static_cast<Half>(v[j]);
    __builtin_memcpy(p + j, &half, sizeof(half));
  }
}
#endif
