// Vectors of 32 bytes in the compiler's own extension: types only, so that no code is shared between instruction sets.
// A block is 64 bytes of values, a cache line.
#pragma once

#include <cstdint>

namespace gmp::cpu {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Bits = uint32_t;  // of one value
  typedef float Type __attribute__((vector_size(32)));
  typedef int32_t Mask __attribute__((vector_size(32)));
};
template <>
struct VectorOf<double> {
  using Bits = uint64_t;
  typedef double Type __attribute__((vector_size(32)));
  typedef int64_t Mask __attribute__((vector_size(32)));
};
template <typename T>
using Vec = typename VectorOf<T>::Type;
template <typename T>
inline constexpr int kWidthOf = 32 / sizeof(T);  // of a vector
template <typename T>
inline constexpr int kLanesOf = 64 / sizeof(T);  // of a block

typedef uint16_t HalfBits __attribute__((vector_size(16)));
typedef uint32_t FloatBits __attribute__((vector_size(32)));

}  // namespace gmp::cpu
