// What the optimizers' arithmetic needs beyond operators, for machines with AVX2, FMA and F16C: AVX-512 ones too, whose
// wide divisions and square roots take twice as long as two of these.
//
// Included inside an anonymous namespace: see kernels_impl.h.

struct Arithmetic {
  static Vec<float> square_root(Vec<float> v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
  static Vec<double> square_root(Vec<double> v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }

  static Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
    return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  static Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
    return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }

  static Vec<float> float_from_half(const uint16_t* p) {
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void half_from_float(uint16_t* p, Vec<float> v) {
    const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
};
