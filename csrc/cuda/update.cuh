// The masked optimizer step for all tensors in one launch.
//
// A thread whose eight weights are all pruned reads their mask byte and nothing else. Compact state holds the kept
// values only: the ranks say how many come before a chunk, a scan over the block how many before a thread.
#pragma once

#include "../update_constants.h"
#include "formats.cuh"

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
    Bits raw[kEach] = {};
    T wide[kEach] = {};
    if (bits != 0) {
      Bits grads[kEach];
      T state[kStates + 1][kEach];
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
      if (!compact) {
#pragma unroll
        for (int k = 0; k < kStates; ++k) {
          if (row.state[k] != 0) store8(pointer<T>(row.state[k]) + i, size, state[k]);
        }
      }
    }
  }
}

// Blocks that a multiprocessor holds at once: 128 registers are enough for a thread but in double.
template <typename Format>
inline constexpr unsigned kUpdaters = sizeof(typename Format::Compute) == 4 ? 2 : 1;

template <Rule kRule, typename Format>
__global__ void __launch_bounds__(kThreads, kUpdaters<Format>)
    update(const UpdateRow* rows, int64_t num_rows, int64_t num_chunks, const UpdateConstants<double>* constants,
           const __grid_constant__ ArgumentConstants argument) {
  using T = typename Format::Compute;
  __shared__ UpdateConstants<T> c;
  int64_t current = -1;
  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t, int64_t begin, int64_t end) {
    const UpdateRow& row = rows[r];
    if (row.constants != current) {
      current = row.constants;
      __syncthreads();
      if (threadIdx.x == 0) {
        c = (constants == nullptr ? argument.rows[current] : constants[current]).template as<T>();
      }
      __syncthreads();
    }
    if (c.skip == T(0)) update_chunk<kRule, Format>(row, c, begin, end);
  });
}

}  // namespace gmp::cuda::kernels
