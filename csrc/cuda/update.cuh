// The masked optimizer step for all tensors in one launch.
//
// Whole tiles of tensors with dense state are done in eights: a thread whose eight weights are all pruned reads only
// their mask byte. Everything else is done weight by weight: compact state, which holds the values of kept weights
// only, the rest at the end of a tensor, and tensors that are not aligned to 16 bytes. There a warp lists the places of
// the kept weights in its part of a chunk and takes 32 of them at a time. So no lane idles over pruned weights, and
// compact state is read and written contiguously.
#pragma once

#include "formats.cuh"
#include "optim/rules.h"

namespace gmp::cuda::kernels {

__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
__device__ inline float square_root(float v) { return __fsqrt_rn(v); }
__device__ inline double square_root(double v) { return __dsqrt_rn(v); }

#define GMP_RULE_FUNCTIONS
#include "optim/update_rule.h"

// Only weights of 16 bits come with wider copies.
template <DType kDType>
inline constexpr bool kMasters = kConverts<kDType>;

// State as it is stored, rounded if that takes fewer bits than it is computed in.
template <DType kState, typename C>
__device__ __forceinline__ Stored<kState> stored_state(ComputeOf<kState> v, const C& c) {
  if constexpr (kState == DType::bfloat16) {
    return static_cast<uint16_t>(rounded_at_random(bits_as<uint32_t>(v), v != v, rounding_factor(c)));
  } else {
    return narrowed<kState>(v);
  }
}

// Number of arrays of state.
template <Rule kRule>
__device__ __forceinline__ int num_states_of(const TensorRow& row) {
  int num_states = kFewestStates<kRule>;
#pragma unroll
  for (int k = kFewestStates<kRule>; k < kMostStates<kRule>; ++k) num_states += row.state[k] != 0;
  return num_states;
}

// The first tiles of a chunk, all of them whole and aligned to 16 bytes; the state is dense.
template <Rule kRule, DType kDType, DType kState>
__device__ __forceinline__ void update_tiles(const TensorRow& row, const UpdateConstants<ComputeOf<kDType>>& c,
                                             int64_t begin, int num_tiles) {
  using Bits = Stored<kDType>;
  using T = ComputeOf<kDType>;
  constexpr int kTiles = kChunk / kTile;
  static_assert(kTiles == 8, "the mask bytes of a thread are one word");
  const int64_t first = begin + threadIdx.x * kEach;
  // Copies, because fields of a table would be read again after every store.
  Bits* const weights = pointer<Bits>(row.weights);
  const Bits* const grads = pointer<const Bits>(row.grads);
  T* const master = pointer<T>(row.master);
  Stored<kState>* states[kMostStates<kRule> + 1] = {};
#pragma unroll
  for (int k = 0; k < kMostStates<kRule>; ++k) states[k] = pointer<Stored<kState>>(row.state[k]);
  const int num_states = num_states_of<kRule>(row);
  // All bytes of the mask are loaded at once, because otherwise each tile would wait for memory twice.
  uint64_t kept_of = ~uint64_t{0};
  if (row.mask != 0) {
    kept_of = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), first + t * kTile, t < num_tiles ? kEach : 0);
      kept_of |= static_cast<uint64_t>(bits) << t * kEach;
    }
  }
  for (int t = 0; t < num_tiles; ++t) {
    const int64_t i = first + t * kTile;
    const unsigned bits = static_cast<unsigned>(kept_of >> (t * kEach)) & 0xff;
    if (bits != 0) {
      // Always initialized, because with undefined values the optimizer of nvcc 13.0 does not terminate.
      Bits raw[kEach] = {}, gradient[kEach] = {};
      T wide[kEach] = {};
      Stored<kState> state[kMostStates<kRule> + 1][kEach] = {};
      const bool is_master = kMasters<kDType> && master != nullptr;
      load8<true>(grads + i, kEach, gradient);
      if (is_master) {
        load8<true>(master + i, kEach, wide);
      } else {
        load8<true>(weights + i, kEach, raw);
      }
#pragma unroll
      for (int k = 0; k < kMostStates<kRule>; ++k) {
        if (states[k] != nullptr) load8<true>(states[k] + i, kEach, state[k]);
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const bool kept = bits >> j & 1;
        T w = T(0), s[kMaxStates] = {};
        if (kept) {
          w = is_master ? wide[j] : widened<kDType>(raw[j]);
#pragma unroll
          for (int k = 0; k < kMostStates<kRule>; ++k) {
            if (states[k] != nullptr) s[k] = widened<kState>(state[k][j]);
          }
          update_one<kRule>(w, static_cast<T>(widened<kDType>(gradient[j])), s, num_states, c);
        }
#pragma unroll
        for (int k = 0; k < kMostStates<kRule>; ++k) state[k][j] = stored_state<kState>(s[k], c);
        if (is_master) wide[j] = w;
        raw[j] = kept ? narrowed<kDType>(w) : Bits(0);
      }
      if (is_master) store8<true>(master + i, kEach, wide);
      store8<true>(weights + i, kEach, raw);
#pragma unroll
      for (int k = 0; k < kMostStates<kRule>; ++k) {
        if (states[k] != nullptr) store8<true>(states[k] + i, kEach, state[k]);
      }
    }
  }
}

// Places of a warp's kept weights, counted from the first weight that it reads.
using Places = uint16_t[kChunk / kWarps];

// The weights [first, size) of a chunk that begins at `begin`. The whole block calls it; warps need not keep step.
template <Rule kRule, DType kDType, DType kState>
__device__ __forceinline__ void update_singly(const TensorRow& row, const UpdateConstants<ComputeOf<kDType>>& c,
                                              int64_t begin, int first, int size, Places* places) {
  using Bits = Stored<kDType>;
  using T = ComputeOf<kDType>;
  constexpr int kWord = 64;  // mask bits of a lane
  constexpr int kAtOnce = sizeof(T) == 4 ? 2 : 1;
  const unsigned lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint8_t* const mask = pointer<const uint8_t>(row.mask);
  // All warps take the same number of words.
  const int run = (size - first + kWord * static_cast<int>(kWarps) - 1) / (kWord * static_cast<int>(kWarps)) * kWord;
  const int start = first + static_cast<int>(warp) * run;
  int64_t compact = 0;
  if (row.chunk_offsets != 0) {
    // The words of the warps before this one tell where its state begins, as the chunk is compact from its first
    // weight.
    int before = 0;
    for (int i = static_cast<int>(lane) * kWord; i < start && i < size; i += kWarpSize * kWord) {
      before += __popcll(load_word(mask, begin + i, size - i));
    }
    compact = pointer<const int64_t>(row.chunk_offsets)[begin / kChunk] + warp_sum(before);
  }
  const int own = start + static_cast<int>(lane) * kWord;
  const int there = static_cast<int>(lane) * kWord < run ? size - own : 0;
  uint64_t kept = load_word(mask, begin + own, there);
  int total;
  int place = warp_scan(__popcll(kept), total);
  for (; kept != 0; kept &= kept - 1) places[warp][place++] = static_cast<uint16_t>(own - start + (__ffsll(kept) - 1));
  __syncwarp();
  Bits* const weights = pointer<Bits>(row.weights) + begin + start;
  const Bits* const grads = pointer<const Bits>(row.grads) + begin + start;
  const bool is_master = kMasters<kDType> && row.master != 0, is_compact = row.chunk_offsets != 0;
  const int num_states = num_states_of<kRule>(row);
  T* const master = pointer<T>(row.master) + (is_master ? begin + start : 0);
  Stored<kState>* states[kMostStates<kRule> + 1] = {};
#pragma unroll
  for (int n = 0; n < kMostStates<kRule>; ++n) {
    states[n] =
        row.state[n] == 0 ? nullptr : pointer<Stored<kState>>(row.state[n]) + (is_compact ? compact : begin + start);
  }
  for (int k0 = static_cast<int>(lane); k0 < total; k0 += kAtOnce * kWarpSize) {
    int at[kAtOnce];
    T w[kAtOnce], g[kAtOnce], s[kAtOnce][kMaxStates];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int k = k0 + u * static_cast<int>(kWarpSize);
      if (k >= total) break;
      at[u] = places[warp][k];
      g[u] = static_cast<T>(widened<kDType>(load1(grads + at[u])));
      w[u] = is_master ? load1(master + at[u]) : static_cast<T>(widened<kDType>(load1(weights + at[u])));
#pragma unroll
      for (int n = 0; n < kMaxStates; ++n) {
        s[u][n] = T(0);
        if (n >= kMostStates<kRule> || states[n] == nullptr) continue;
        s[u][n] = widened<kState>(load1(states[n] + (is_compact ? k : at[u])));
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int k = k0 + u * static_cast<int>(kWarpSize);
      if (k >= total) break;
      update_one<kRule>(w[u], g[u], s[u], num_states, c);
      if (is_master) store1(master + at[u], w[u]);
      store1(weights + at[u], narrowed<kDType>(w[u]));
#pragma unroll
      for (int n = 0; n < kMostStates<kRule>; ++n) {
        if (states[n] != nullptr) store1(states[n] + (is_compact ? k : at[u]), stored_state<kState>(s[u][n], c));
      }
    }
  }
  __syncwarp();  // the places are written again; shuffles synchronize lanes but do not order memory
}

// Blocks that a multiprocessor holds at once: except in double, 128 registers are enough for a thread.
template <DType kDType>
inline constexpr unsigned kUpdaters = sizeof(ComputeOf<kDType>) == 4 ? 2 : 1;

template <Rule kRule, DType kDType, DType kState>
__global__ void __launch_bounds__(kThreads, kUpdaters<kDType>)
    update(const TensorRow* rows, int64_t num_rows, int64_t num_chunks, const UpdateConstants<double>* constants,
           const __grid_constant__ ArgumentConstants argument) {
  using T = ComputeOf<kDType>;
  __shared__ UpdateConstants<T> c;
  __shared__ Places places[kWarps];
  // In 32 bits, because registers are scarce here.
  int chunk = static_cast<int>(first_chunk_of(blockIdx.x, num_chunks)), current = -1;
  const int last = static_cast<int>(first_chunk_of(blockIdx.x + 1, num_chunks));
  int r = static_cast<int>(row_of(rows, num_rows, chunk));
  for (; chunk < last; ++chunk) {
    while (r + 1 < num_rows && rows[r + 1].first_chunk <= chunk) ++r;
    const TensorRow& row = rows[r];
    if (row.constants != current) {
      current = static_cast<int>(row.constants);
      __syncthreads();
      if (threadIdx.x == 0) {
        c = (constants == nullptr ? argument[current] : constants[current]).template as<T>();
      }
      __syncthreads();
    }
    if (c.skip != T(0)) continue;
    uint64_t addresses = row.weights | row.grads | row.master;
#pragma unroll
    for (uint64_t state : row.state) addresses |= state;
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int size = static_cast<int>(row.n - begin < kChunk ? row.n - begin : kChunk);
    const int num_tiles = row.chunk_offsets == 0 && addresses % 16 == 0 ? size / static_cast<int>(kTile) : 0;
    const int done = num_tiles * static_cast<int>(kTile);
    if (done < size) update_singly<kRule, kDType, kState>(row, c, begin, done, size, places);
    if (num_tiles > 0) update_tiles<kRule, kDType, kState>(row, c, begin, num_tiles);
  }
}

}  // namespace gmp::cuda::kernels
