// Vectors in the compiler's own extension, as wide as the instruction set has them: compilers take wider ones apart
// value by value. A block is 64 bytes of values, a cache line.
//
// Machines with AVX-512 compute in vectors of AVX too, because one of their wide divisions or square roots takes twice
// as long as two narrow ones. Included inside an anonymous namespace: see kernel_set.h.

#if defined(__AVX2__)
#define GMP_VECTOR_BYTES 32
#else
#define GMP_VECTOR_BYTES 16
#endif

typedef float Floats __attribute__((vector_size(GMP_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(GMP_VECTOR_BYTES)));
typedef uint32_t FloatBits __attribute__((vector_size(GMP_VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(GMP_VECTOR_BYTES / 2)));

template <typename T>
using Vec = std::conditional_t<sizeof(T) == 8, Doubles, Floats>;
template <typename T>
inline constexpr int kWidthOf = GMP_VECTOR_BYTES / sizeof(T);  // of a vector
template <typename T>
inline constexpr int kLanesOf = 64 / sizeof(T);  // of a block

#undef GMP_VECTOR_BYTES
