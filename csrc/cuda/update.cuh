// The masked optimizer step for all tensors in one launch, which may count what it writes as the first read of a
// selection would.
//
// A thread whose eight weights are all pruned reads their mask byte and nothing else. Compact state holds the kept
// values only: the ranks say how many come before a chunk, a scan over the block how many before a thread.
#pragma once

#include "../update_constants.h"
#include "formats.cuh"
#include "select.cuh"

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

// The selection that goes along with a step.
struct Tally {
  LayerRow* layers;
  GroupRow* groups;
  Workspace space;  // with kBins bins per group
};

// Counts weights while they are at hand. Key: of what is ranked, the weights or their master copies; void: nothing is.
template <typename Key>
class Ranking {
 public:
  // Whether weights of this type are what is ranked, not the master copy.
  template <typename Bits>
  static constexpr bool takes = sizeof(Bits) == sizeof(Key);

  __device__ Ranking(const Tally& tally, uint64_t infinity)
      : tally_(tally), counter_(shared(), tally.space.capacity, static_cast<Key>(infinity)) {}

  // The chunks of this layer come next; -1: they are not ranked.
  __device__ void enter(int64_t layer) {
    layer_ = layer < 0 ? nullptr : tally_.layers + layer;
    if (layer_ == nullptr || layer_->group == group_) return;
    leave();
    group_ = layer_->group;
    const GroupRow& group = tally_.groups[group_];
    counter_.aim(group.lo, group.hi, group.shift);
  }

  template <typename Value>
  __device__ __forceinline__ void take(int64_t i, const Value (&written)[kEach]) {
    if (layer_ == nullptr) return;
    const int size = count_from(i, layer_->n);
    const unsigned bits = load_bits(pointer<const uint8_t>(layer_->mask), i, size);
    counter_.pruned += size - count_bits(bits);
    Key raw[kEach];
    memcpy(raw, written, sizeof(raw));
    Word<Key> keys[kEach];
    keys_of(raw, bits, keys);
    const Key* const again = pointer<const Key>(layer_->weights) + i;
    counter_.take(keys, bits, i, [&](int k) { return again[k]; }, [](Key) {});
  }

  // Instead of all take(), where the chunk stays as it is.
  __device__ void read(int64_t begin, int64_t end) {
    if (layer_ != nullptr) count_chunk(layer_->weights, layer_->mask, layer_->n, begin, end, counter_, [](Key) {});
  }

  __device__ void end_chunk(int64_t begin) {
    if (layer_ == nullptr) return;
    const int64_t number = layer_->first_chunk + begin / kChunk;
    kernels::end_chunk(counter_, *layer_, tally_.groups[group_], tally_.space, number);
  }

  __device__ void leave() {
    if (group_ < 0) return;
    add_sums(tally_.groups[group_], counter_);
    counter_.move_bins(pointer<unsigned long long>(tally_.space.bins) + group_ * kBins, kBins);
    __syncthreads();  // the next chunk counts into them
  }

 private:
  __device__ static Counts<Key>& shared() {
    __shared__ Counts<Key> counts;
    return counts;
  }

  const Tally& tally_;
  Counter<Key> counter_;
  LayerRow* layer_ = nullptr;
  int64_t group_ = -1;
};

template <>
class Ranking<void> {
 public:
  template <typename>
  static constexpr bool takes = true;

  __device__ Ranking(const Tally&, uint64_t) {}
  __device__ void enter(int64_t) {}
  template <typename Value>
  __device__ void take(int64_t, const Value (&)[kEach]) {}
  __device__ void read(int64_t, int64_t) {}
  __device__ void end_chunk(int64_t) {}
  __device__ void leave() {}
};

template <Rule kRule, typename Format, typename Key>
__device__ __forceinline__ void update_chunk(const UpdateRow& row, const UpdateConstants<typename Format::Compute>& c,
                                             int64_t begin, int64_t end, Ranking<Key>& ranking) {
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
    if constexpr (Ranking<Key>::template takes<Bits>) {
      ranking.take(i, raw);
    } else {
      ranking.take(i, wide);
    }
  }
}

// Blocks that a multiprocessor holds at once: 128 registers are enough for a thread but in double, or with a ranking.
template <typename Format, typename Key>
inline constexpr unsigned kUpdaters = sizeof(typename Format::Compute) == 4 && std::is_void_v<Key> ? 2 : 1;

template <Rule kRule, typename Format, typename Key>
__global__ void __launch_bounds__(kThreads, (kUpdaters<Format, Key>))
    update(const UpdateRow* rows, int64_t num_rows, int64_t num_chunks, const UpdateConstants<double>* constants,
           Tally tally, uint64_t infinity) {
  using T = typename Format::Compute;
  __shared__ UpdateConstants<T> c;
  Ranking<Key> ranking(tally, infinity);
  int64_t current = -1;
  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t, int64_t begin, int64_t end) {
    const UpdateRow& row = rows[r];
    if (row.constants != current) {
      current = row.constants;
      __syncthreads();
      if (threadIdx.x == 0) c = constants[current].template as<T>();
      __syncthreads();
    }
    ranking.enter(row.layer);
    if (c.skip) {
      ranking.read(begin, end);
    } else {
      update_chunk<kRule, Format>(row, c, begin, end, ranking);
    }
    ranking.end_chunk(begin);
  });
  ranking.leave();
}

}  // namespace gmp::cuda::kernels
