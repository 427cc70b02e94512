// Formats in which weights are stored, and the types in which they are computed; bit for bit as in the CPU's vectors.
#pragma once

#include "device.cuh"
#include "order/dtypes.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace gmp::cuda::kernels {

// Floats and doubles are stored as they are computed.
template <DType kDType>
inline constexpr bool kConverts = sizeof(KeyOf<kDType>) != sizeof(ComputeOf<kDType>);
template <DType kDType>
using Stored = std::conditional_t<kConverts<kDType>, KeyOf<kDType>, ComputeOf<kDType>>;

// The same bits as another type.
template <typename To, typename From>
__device__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <DType kDType>
__device__ ComputeOf<kDType> widened(Stored<kDType> stored) {
  if constexpr (kDType == DType::bfloat16) {
    return bits_as<float>(static_cast<uint32_t>(stored) << 16);
  } else if constexpr (kDType == DType::float16) {
    return static_cast<float>(bits_as<__half>(stored));
  } else {
    static_assert(!kConverts<kDType>, "this dtype needs conversions");
    return stored;
  }
}

template <DType kDType>
__device__ Stored<kDType> narrowed(ComputeOf<kDType> v) {
  if constexpr (kDType == DType::bfloat16) {
    const auto bits = bits_as<uint32_t>(v);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else if constexpr (kDType == DType::float16) {
    // Conversions agree on numbers, but not on the bits of NaN.
    if (v != v) {
      const auto wide = bits_as<uint32_t>(v);
      return static_cast<uint16_t>((wide >> 16 & 0x8000) | 0x7e00 | (wide >> 13 & 0x3ff));
    }
    return bits_as<uint16_t>(static_cast<__half>(v));
  } else {
    static_assert(!kConverts<kDType>, "this dtype needs conversions");
    return v;
  }
}

}  // namespace gmp::cuda::kernels
