// The masked optimizer step for all tensors in one launch, and what else walks over optimizer state.
//
// A thread whose eight weights are all pruned reads their mask byte and nothing else. Compact state holds the kept
// values only: the ranks say how many come before a chunk, a scan over the block how many before a thread.
#pragma once

#include "../dtypes.h"
#include "../update_constants.h"
#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace gmp::cuda::kernels {

#if defined(__CUDACC__)
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float square_root(float v) { return __fsqrt_rn(v); }
__device__ inline double square_root(double v) { return __dsqrt_rn(v); }
#else
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float square_root(float v) { return __builtin_sqrtf(v); }
inline double square_root(double v) { return __builtin_sqrt(v); }
#endif

#define GMP_RULE_INLINE __device__ inline
#include "../update_rule.h"
#undef GMP_RULE_INLINE

// How a weight is stored, and the type it is computed in; bit for bit what the CPU's vectors do.
template <typename T>
struct Wide {
  using Bits = T;
  using Compute = T;
  __device__ static T load(T bits) { return bits; }
  __device__ static T store(T v) { return v; }
};

struct BFloat16 {
  using Bits = uint16_t;
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

struct Float16 {
  using Bits = uint16_t;
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

template <Rule kRule, typename Format>
__device__ __forceinline__ void update_chunk(const UpdateRow& row, const UpdateConstants<typename Format::Compute>& c,
                                             int64_t begin, int64_t end) {
  using Bits = typename Format::Bits;
  using T = typename Format::Compute;
  // Not more than the rule keeps: what is not there costs no registers.
  constexpr int kStates = kRule == Rule::adam ? 3 : kRule == Rule::sgd ? 1 : 0;
  Bits* const weights = pointer<Bits>(row.weights);
  T* const master = pointer<T>(row.master);
  const uint8_t* const mask = pointer<const uint8_t>(row.mask);
  const bool compact = row.ranks != 0;
  int64_t rank = compact ? pointer<const int64_t>(row.ranks)[begin / kChunk] : 0;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t i = tile + threadIdx.x * kEach;
    const int size = count_from(i, row.n);
    const unsigned bits = load_bits(mask, i, size);
    int64_t place = i;
    if (compact) {
      int total;
      place = rank + block_scan(count_bits(bits), total);
      rank += total;
    }
    if (bits == 0) continue;
    Bits raw[kEach], grads[kEach];
    T wide[kEach], state[kStates + 1][kEach];
    load8(pointer<const Bits>(row.grads) + i, size, grads);
    if (master != nullptr) {
      load8(master + i, size, wide);
    } else {
      load8(weights + i, size, raw);
    }
    if (!compact) {
#pragma unroll
      for (int k = 0; k < kStates; ++k) {
        if (row.state[k] != 0) load8(pointer<T>(row.state[k]) + i, size, state[k]);
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const bool kept = bits >> j & 1;
      T w = T(0), s[3] = {T(0), T(0), T(0)};
      if (kept) {
        w = master != nullptr ? wide[j] : Format::load(raw[j]);
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          if (row.state[k] != 0) s[k] = compact ? load1(pointer<T>(row.state[k]) + place) : state[k][j];
        }
        update_one<kRule, T>(w, static_cast<T>(Format::load(grads[j])), s[0], s[1], s[2], row.state[0] != 0,
                             row.state[2] != 0, c);
        if (compact) {
#pragma unroll
          for (int k = 0; k < kStates; ++k) {
            if (row.state[k] != 0) store1(pointer<T>(row.state[k]) + place, s[k]);
          }
          ++place;
        }
      }
#pragma unroll
      for (int k = 0; k < kStates; ++k) state[k][j] = s[k];
      wide[j] = w;
      raw[j] = kept ? Format::store(w) : Bits(0);
    }
    if (master != nullptr) store8(master + i, size, wide);
    store8(weights + i, size, raw);
    if (compact) continue;
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (row.state[k] != 0) store8(pointer<T>(row.state[k]) + i, size, state[k]);
    }
  }
}

template <Rule kRule, typename Format>
__global__ void __launch_bounds__(kThreads, 1)
    update(const UpdateRow* rows, int64_t num_rows, int64_t num_chunks, const UpdateConstants<double>* constants) {
  using T = typename Format::Compute;
  __shared__ UpdateConstants<T> c;
  int64_t current = -1;
  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t, int64_t begin, int64_t end) {
    if (rows[r].constants != current) {
      current = rows[r].constants;
      __syncthreads();
      if (threadIdx.x == 0) c = constants[current].template as<T>();
      __syncthreads();
    }
    update_chunk<kRule, Format>(rows[r], c, begin, end);
  });
}

// One value per kept weight on its way from layout to layout.
template <typename Bits>
__device__ void repack_chunk(const RepackRow& row, int64_t begin, int64_t end) {
  const uint8_t* const masks[2] = {pointer<const uint8_t>(row.from_mask), pointer<const uint8_t>(row.to_mask)};
  const uint64_t ranks[2] = {row.from_ranks, row.to_ranks};
  int64_t rank[2] = {};
  for (int side = 0; side < 2; ++side) {
    if (masks[side] != nullptr) rank[side] = pointer<const int64_t>(ranks[side])[begin / kChunk];
  }
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t i = tile + threadIdx.x * kEach;
    const int size = count_from(i, row.n);
    unsigned bits[2];
    int64_t place[2];
    for (int side = 0; side < 2; ++side) {
      bits[side] = load_bits(masks[side], i, size);
      place[side] = i;
      if (masks[side] == nullptr) continue;
      int total;
      place[side] = rank[side] + block_scan(count_bits(bits[side]), total);
      rank[side] += total;
    }
    int read = 0, written = 0;
    for (int j = 0; j < size; ++j) {
      Bits value{};
      if (bits[0] >> j & 1) {
        memcpy(&value, pointer<const Bits>(row.from) + place[0] + read, sizeof(Bits));
        ++read;
      }
      if (bits[1] >> j & 1) {
        memcpy(pointer<Bits>(row.to) + place[1] + written, &value, sizeof(Bits));
        ++written;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) repack(const RepackRow* rows, int64_t num_rows, int64_t num_chunks) {
  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t, int64_t begin, int64_t end) {
    if (rows[r].value_bytes == 4) {
      repack_chunk<uint32_t>(rows[r], begin, end);
    } else {
      repack_chunk<uint64_t>(rows[r], begin, end);
    }
  });
}

// Kept weights before each chunk of one mask, and their number. One block: 64 KB of mask per million weights.
__global__ void __launch_bounds__(kThreads) ranks(const uint8_t* mask, int64_t n, int64_t* ranks) {
  const int64_t num_chunks = (n + kChunk - 1) / kChunk;
  int64_t before = 0;
  for (int64_t first = 0; first < num_chunks; first += kThreads) {
    const int64_t chunk = first + threadIdx.x;
    int64_t kept = 0;
    if (chunk < num_chunks) {
      const int64_t end = (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n;
      for (int64_t i = chunk * kChunk; i < end; i += kEach) kept += count_bits(load_bits(mask, i, count_from(i, n)));
    }
    int64_t total;
    const int64_t scan = block_scan(kept, total);
    if (chunk < num_chunks) ranks[chunk] = before + scan;
    before += total;
  }
  if (threadIdx.x == 0) ranks[num_chunks] = before;
}

template <typename Format>
__device__ double sum_squares_of(const GradRow& row, int64_t begin, int64_t end) {
  using Bits = typename Format::Bits;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x * kEach; i < end; i += kTile) {
    const int size = count_from(i, row.n);
    const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), i, size);
    if (bits == 0) continue;
    Bits raw[kEach];
    load8(pointer<const Bits>(row.grads) + i, size, raw);
    for (int j = 0; j < kEach; ++j) {
      const double g = static_cast<double>(Format::load(raw[j]));
      if (bits >> j & 1) sum += g * g;
    }
  }
  return sum;
}

// Sums of the chunks, added up by `total` in an order that depends on their number alone.
__global__ void __launch_bounds__(kThreads)
    sum_squares(const GradRow* rows, int64_t num_rows, int64_t num_chunks, double* sums) {
  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t chunk, int64_t begin, int64_t end) {
    double sum = 0;
    switch (static_cast<DType>(rows[r].dtype)) {
      case DType::float32:
        sum = sum_squares_of<Wide<float>>(rows[r], begin, end);
        break;
      case DType::float64:
        sum = sum_squares_of<Wide<double>>(rows[r], begin, end);
        break;
      case DType::float16:
        sum = sum_squares_of<Float16>(rows[r], begin, end);
        break;
      case DType::bfloat16:
        sum = sum_squares_of<BFloat16>(rows[r], begin, end);
        break;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[chunk] = sum;
  });
}

__global__ void __launch_bounds__(kThreads) total(double* sums, int64_t num_chunks) {
  double sum = 0;
  for (int64_t c = threadIdx.x; c < num_chunks; c += kThreads) sum += sums[c];
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[num_chunks] = sum;
}

}  // namespace gmp::cuda::kernels
