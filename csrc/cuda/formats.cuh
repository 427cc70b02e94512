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

template <DType kDType>
__device__ ComputeOf<kDType> widened(Stored<kDType> stored) {
  if constexpr (kDType == DType::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(stored) << 16;
    float v;
    memcpy(&v, &wide, sizeof(v));
    return v;
  } else if constexpr (kDType == DType::float16) {
    __half half;
    memcpy(&half, &stored, sizeof(stored));
    return static_cast<float>(half);
  } else {
    static_assert(!kConverts<kDType>, "this dtype needs conversions");
    return stored;
  }
}

template <DType kDType>
__device__ Stored<kDType> narrowed(ComputeOf<kDType> v) {
  if constexpr (kDType == DType::bfloat16) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(v));
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else if constexpr (kDType == DType::float16) {
    // Conversions agree on numbers, but not on the bits of NaN.
    if (v != v) {
      uint32_t wide;
      memcpy(&wide, &v, sizeof(v));
      return static_cast<uint16_t>((wide >> 16 & 0x8000) | 0x7e00 | (wide >> 13 & 0x3ff));
    }
    const __half half = static_cast<__half>(v);
    uint16_t bits;
    memcpy(&bits, &half, sizeof(bits));
    return bits;
  } else {
    static_assert(!kConverts<kDType>, "this dtype needs conversions");
    return v;
  }
}

}  // namespace gmp::cuda::kernels
