// How weights are stored, and the type they are computed in; bit for bit what the CPU's vectors do.
#pragma once

#include "device.cuh"
#include "order/dtypes.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace gmp::cuda::kernels {

// Floats and doubles are stored as they are computed.
template <DType kDType>
struct FormatOf {
  using Compute = ComputeOf<kDType>;
  using Bits = Compute;
  static_assert(sizeof(Bits) == sizeof(KeyOf<kDType>), "this dtype needs conversions");
  __device__ static Compute load(Bits bits) { return bits; }
  __device__ static Bits store(Compute v) { return v; }
};

template <>
struct FormatOf<DType::bfloat16> {
  using Bits = KeyOf<DType::bfloat16>;
  using Compute = float;
  __device__ static float load(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float v;
    memcpy(&v, &wide, sizeof(v));
    return v;
  }
  __device__ static uint16_t store(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(v));
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <>
struct FormatOf<DType::float16> {
  using Bits = KeyOf<DType::float16>;
  using Compute = float;
#if defined(__CUDACC__)
  using Half = __half;
#else
  using Half = _Float16;
#endif
  __device__ static float load(uint16_t bits) {
    Half half;
    memcpy(&half, &bits, sizeof(bits));
    return static_cast<float>(half);
  }
  __device__ static uint16_t store(float v) {
    // Converters agree on numbers but not on which NaN comes out.
    if (v != v) {
      uint32_t wide;
      memcpy(&wide, &v, sizeof(v));
      return static_cast<uint16_t>((wide >> 16 & 0x8000) | 0x7e00 | (wide >> 13 & 0x3ff));
    }
    const Half half = static_cast<Half>(v);
    uint16_t bits;
    memcpy(&bits, &half, sizeof(bits));
    return bits;
  }
};

}  // namespace gmp::cuda::kernels
