// Vectors of 32 bytes in the compiler's own extension: types only, so that no code is shared between instruction sets.
// A block is 64 bytes of values, a cache line.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__F16C__) && defined(__FMA__)
#include <immintrin.h>
#endif

namespace gmp::cpu {

typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(32)));
typedef uint32_t FloatBits __attribute__((vector_size(32)));
typedef uint16_t HalfBits __attribute__((vector_size(16)));

template <typename T>
using Vec = std::conditional_t<sizeof(T) == 8, Doubles, Floats>;
template <typename T>
inline constexpr int kWidthOf = 32 / sizeof(T);  // of a vector
template <typename T>
inline constexpr int kLanesOf = 64 / sizeof(T);  // of a block

}  // namespace gmp::cpu
