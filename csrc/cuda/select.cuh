// Exact selection for all layers in a fixed number of launches: begin, count (some times), ties.
//
//   begin  a sample of each group's keys gives the bracket [lo, hi]
//   count  the first one reads every weight once: how many keys lie below the bracket, a histogram of those inside, and
//          the keys themselves in a short list per chunk. The last block of a group checks the proof,
//          below < wanted <= below + inside, and narrows the bracket to the bin with the wanted key. Further ones read
//          the lists; where the proof failed or a list overflowed, all weights; where all is done, nothing.
//   ties   finds the index at which the tied weights that stay end
//
// Nothing here depends on the order in which blocks run: all sums are of integers, lists are used as sets.
// Source: Floyd and Rivest, CACM 18(3), 1975, as streamed by GPU top-k selections; histograms as in radix selection.
#pragma once

#include "device.cuh"

namespace gmp::cuda::kernels {

inline constexpr int64_t kSampleEights = 2048;  // at most: 16384 keys
inline constexpr int64_t kNoIndex = INT64_MAX;

// Keys in 2048 bins that saturate: 64 to the octave from 2^-24 on for wide keys, one per key for bfloat16.
template <typename Key>
struct SampleBins {
  Key base;
  int shift;

  __device__ explicit SampleBins(Key infinity) {
    const int mantissa = sizeof(Key) == 8 ? 52 : sizeof(Key) == 4 ? 23 : infinity == Key(0x7c00) ? 10 : 7;
    const int64_t bias = (static_cast<int64_t>(infinity) >> mantissa) / 2;
    const int resolution = mantissa == 7 ? 7 : 6;  // bits of the mantissa that a bin tells apart
    const int64_t below_one = mantissa == 7 ? 15 : 24;
    base = bias > below_one ? static_cast<Key>((bias - below_one) << mantissa) : Key(0);
    shift = mantissa - resolution;
  }
  __device__ int64_t bin(Key key) const {
    const int64_t d = key < base ? 0 : static_cast<int64_t>(static_cast<Key>(key - base) >> shift);
    return d < kBins ? d : kBins - 1;
  }
  __device__ Key lower(int64_t bin) const {
    return bin == 0 ? Key(0) : static_cast<Key>(base + (static_cast<Key>(bin) << shift));
  }
  __device__ Key upper(int64_t bin, Key largest) const {
    return bin == kBins - 1 ? largest : static_cast<Key>(lower(bin + 1) - 1);
  }
};

// Smallest shift that maps [lo, hi] into the bins.
__device__ inline int64_t shift_of(uint64_t lo, uint64_t hi) {
  int64_t shift = 0;
  while ((hi - lo) >> shift >= static_cast<uint64_t>(kBins)) ++shift;
  return shift;
}

// The bin where the running sum of counts first exceeds `rank`; one thread's bins are kBins / kThreads in a row.
template <typename Count>
struct Crossing {
  int64_t bin = -1;             // -1: it is another thread's
  Count before = 0, count = 0;  // of the bins before it, and its own

  __device__ __forceinline__ Crossing(const Count (&counts)[kBins / kThreads], Count running, Count rank) {
#pragma unroll
    for (int b = 0; b < kBins / kThreads; ++b) {
      if (running <= rank && rank < running + counts[b]) {
        bin = threadIdx.x * (kBins / kThreads) + b;
        before = running;
        count = counts[b];
      }
      running += counts[b];
    }
  }
};

// One block per group.
template <typename Key>
__global__ void __launch_bounds__(kThreads) begin(LayerRow* layers, GroupRow* groups, Key infinity) {
  __shared__ unsigned hist[kBins];
  __shared__ int64_t edges[2];
  GroupRow& group = groups[blockIdx.x];
  const LayerRow* const rows = layers + group.first_layer;
  const SampleBins<Key> bins(infinity);
  for (int64_t b = threadIdx.x; b < kBins; b += kThreads) hist[b] = 0;
  if (threadIdx.x < 2) edges[threadIdx.x] = threadIdx.x == 0 ? 0 : kBins - 1;
  for (int64_t l = threadIdx.x; l < group.num_layers; l += kThreads) {
    layers[group.first_layer + l].nonfinite = kNoIndex;
    layers[group.first_layer + l].cut = rows[l].n;
  }
  __syncthreads();

  // Eights at pseudo-random places of evenly spread chunks: in step with no period of the weights.
  const int64_t eights = group.n / kEach < kSampleEights * 8 ? group.n / kEach / 8 + 1 : kSampleEights;
  unsigned sampled = 0, pruned = 0;
  for (int64_t e = threadIdx.x; e < eights; e += kThreads) {
    const int64_t chunk = group.first_chunk + e * group.num_chunks / eights;
    const LayerRow& row = rows[row_of(rows, group.num_layers, chunk)];
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int64_t size = row.n - begin < kChunk ? row.n - begin : kChunk;
    uint64_t random = static_cast<uint64_t>(e + 1) * 0x9e3779b97f4a7c15ull;
    random ^= random >> 29;
    const int64_t i =
        begin + static_cast<int64_t>(random * 0xbf58476d1ce4e5b9ull >> 33) % ((size + kEach - 1) / kEach) * kEach;
    const int count = count_from(i, row.n);
    const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), i, count);
    Key raw[kEach];
    load8(pointer<const Key>(row.weights) + i, count, raw);
    sampled += count;
    pruned += count - count_bits(bits);
    for (int j = 0; j < kEach; ++j) {
      if (bits >> j & 1) atomicAdd(&hist[bins.bin(magnitude_key(raw[j], infinity))], 1u);
    }
  }
  sampled = block_sum(sampled);
  pruned = block_sum(pruned);

  const float share = static_cast<float>(static_cast<double>(group.num_prune) / static_cast<double>(group.n));
  const float rank = share * static_cast<float>(sampled);
  const float half = 2.0f + 4.0f * sqrtf(rank * (1.0f - share));  // fails once in 10^4 selections
  unsigned counts[kBins / kThreads], sum = 0, total;
  for (int b = 0; b < kBins / kThreads; ++b) sum += counts[b] = hist[threadIdx.x * (kBins / kThreads) + b];
  const unsigned before = pruned + block_scan(sum, total);
  for (int side = 0; side < 2; ++side) {
    const float wanted = side == 0 ? rank - half : rank + half;
    if (wanted < static_cast<float>(pruned) || wanted >= static_cast<float>(sampled)) continue;
    const Crossing<unsigned> crossing(counts, before, static_cast<unsigned>(wanted));
    if (crossing.bin >= 0) edges[side] = crossing.bin;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  const Key largest = static_cast<Key>(infinity + 1);
  group.lo = bins.lower(edges[0]);
  group.hi = bins.upper(edges[1], largest);
  if (rank + half < static_cast<float>(pruned)) group.hi = bins.upper(0, largest);  // all that is wanted is pruned
  group.shift = shift_of(group.lo, group.hi);
  group.mode = kStream;
  group.passes = group.below = group.pruned = group.overflow = group.listed = group.blocks_done = 0;
}

// What a block has found of its current group.
struct Found {
  int64_t below = 0, pruned = 0;
};

template <typename Key>
struct Workspace {
  unsigned long long* bins;  // kBins per group
  Key* lists;                // kListCapacity per chunk
  unsigned* list_counts;     // per chunk
  unsigned* tie_counts;      // per chunk
};

// The last block of a group: prove the bracket and narrow it.
template <typename Key>
__device__ void narrow(LayerRow* layers, GroupRow& group, unsigned long long* bins, Key infinity) {
  constexpr int kPerThread = kBins / kThreads;
  __shared__ bool finished;
  const uint64_t lo = group.lo, hi = group.hi;
  const int64_t shift = group.shift, mode = group.mode;
  const int64_t below = __ldcg(&group.below), pruned = __ldcg(&group.pruned);
  const bool listed = mode == kList || (mode == kStream && __ldcg(&group.overflow) == 0);
  const int64_t wanted = group.num_prune - pruned;  // rank, from 1, among the unpruned
  unsigned long long counts[kPerThread], sum = 0, inside;
#pragma unroll
  for (int b = 0; b < kPerThread; ++b) {
    unsigned long long* const bin = bins + threadIdx.x * kPerThread + b;
    sum += counts[b] = __ldcg(bin);
    *bin = 0;
  }
  const unsigned long long before = block_scan(sum, inside);
  const bool proven = wanted > below && wanted <= below + static_cast<int64_t>(inside);
  if (threadIdx.x == 0) finished = wanted <= 0;
  __syncthreads();
  if (wanted <= 0) {
    if (threadIdx.x == 0) {
      group.key = 0;
      group.num_below = pruned;
      group.num_ties = group.num_ties_kept = 0;
    }
  } else if (!proven) {
    if (threadIdx.x == 0) {
      const bool too_high = wanted <= below;
      group.lo = too_high ? 0 : hi + 1;
      group.hi = too_high ? lo - 1 : static_cast<uint64_t>(infinity) + 1;
      group.below = too_high ? 0 : below + static_cast<int64_t>(inside);
      group.shift = shift_of(group.lo, group.hi);
      group.mode = kFull;
    }
  } else {
    const Crossing<unsigned long long> crossing(counts, before, static_cast<unsigned long long>(wanted - below - 1));
    if (crossing.bin >= 0) {
      const int64_t lower = below + static_cast<int64_t>(crossing.before);
      const uint64_t first = lo + (static_cast<uint64_t>(crossing.bin) << shift);
      if (shift == 0) {
        group.key = first;
        group.num_below = pruned + lower;
        group.num_ties = crossing.count;
        group.num_ties_kept = group.num_below + group.num_ties - group.num_prune;
        group.listed = listed;
        finished = true;
      } else {
        const uint64_t last = first + ((uint64_t{1} << shift) - 1);
        group.lo = first;
        group.hi = last < hi ? last : hi;
        group.below = lower;
        group.shift = shift_of(group.lo, group.hi);
        group.mode = listed ? kList : kFull;
      }
    }
  }
  __syncthreads();
  if (finished && wanted > 0) {
    for (int64_t l = threadIdx.x; l < group.num_layers; l += kThreads) layers[group.first_layer + l].cut = 0;
  }
  if (threadIdx.x == 0) {
    if (finished) group.mode = kDone;
    ++group.passes;
    group.blocks_done = 0;
  }
  __syncthreads();  // `finished` is used again
}

__device__ inline int64_t num_blocks_of(const GroupRow& group, int64_t num_chunks) {
  return block_of(group.first_chunk + group.num_chunks - 1, num_chunks) - block_of(group.first_chunk, num_chunks) + 1;
}

template <typename Key>
__global__ void __launch_bounds__(kThreads) count(LayerRow* layers, int64_t num_layers, GroupRow* groups,
                                                  int64_t num_chunks, Workspace<Key> space, Key infinity) {
  __shared__ unsigned hist[kBins];
  __shared__ unsigned appended;
  for (int64_t b = threadIdx.x; b < kBins; b += kThreads) hist[b] = 0;
  if (threadIdx.x == 0) appended = 0;
  __syncthreads();
  int64_t current = -1;
  Found found;

  const auto flush = [&] {
    if (current < 0) return;
    GroupRow& group = groups[current];
    if (group.mode == kDone) return;
    __syncthreads();
    unsigned long long* const bins = space.bins + current * kBins;
    for (int64_t b = threadIdx.x; b < kBins; b += kThreads) {
      if (hist[b] != 0) atomicAdd(&bins[b], static_cast<unsigned long long>(hist[b]));
      hist[b] = 0;
    }
    if (group.passes == 0) {
      const unsigned long long below = block_sum(static_cast<unsigned long long>(found.below));
      const unsigned long long pruned = block_sum(static_cast<unsigned long long>(found.pruned));
      if (threadIdx.x == 0) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&group.below), below);
        atomicAdd(reinterpret_cast<unsigned long long*>(&group.pruned), pruned);
      }
    }
    found = Found{};
    if (is_last_block(&group.blocks_done, num_blocks_of(group, num_chunks))) {
      narrow<Key>(layers, group, bins, infinity);
    }
  };

  for_each_chunk(layers, num_layers, num_chunks, [&](int64_t l, int64_t chunk, int64_t begin, int64_t end) {
    LayerRow& layer = layers[l];
    if (layer.group != current) {
      flush();
      current = layer.group;
    }
    const GroupRow& group = groups[current];
    const int64_t mode = group.mode;
    if (mode == kDone) return;
    const Key lo = static_cast<Key>(group.lo), hi = static_cast<Key>(group.hi);
    const int shift = static_cast<int>(group.shift);
    Key* const list = space.lists + chunk * kListCapacity;
    if (mode == kList) {
      const unsigned size = space.list_counts[chunk];
      for (unsigned k = threadIdx.x; k < size; k += kThreads) {
        const Key key = list[k];
        if (key >= lo && key <= hi) atomicAdd(&hist[static_cast<Key>(key - lo) >> shift], 1u);
      }
      return;
    }
    const bool is_first = group.passes == 0;
    int64_t nonfinite = kNoIndex;
    for (int64_t i = begin + threadIdx.x * kEach; i < end; i += kTile) {
      const int size = count_from(i, layer.n);
      const unsigned bits = load_bits(pointer<const uint8_t>(layer.mask), i, size);
      found.pruned += size - count_bits(bits);
      if (bits == 0) continue;
      Key keys[kEach];
      load8(pointer<const Key>(layer.weights) + i, size, keys);
      unsigned inside = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!(bits >> j & 1)) continue;
        keys[j] = magnitude_key(keys[j], infinity);
        if (keys[j] >= infinity && i + j < nonfinite) nonfinite = i + j;
        if (keys[j] < lo) {
          ++found.below;
        } else if (keys[j] <= hi) {
          inside |= 1u << j;
          atomicAdd(&hist[static_cast<Key>(keys[j] - lo) >> shift], 1u);
        }
      }
      if (mode != kStream || inside == 0) continue;
      unsigned place = atomicAdd(&appended, static_cast<unsigned>(count_bits(inside)));
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (!(inside >> j & 1)) continue;
        if (place < kListCapacity) list[place] = keys[j];
        ++place;
      }
    }
    if (is_first && nonfinite != kNoIndex) {
      atomicMin(reinterpret_cast<unsigned long long*>(&layer.nonfinite), static_cast<unsigned long long>(nonfinite));
    }
    if (mode != kStream) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      space.list_counts[chunk] = appended;
      if (appended > kListCapacity) atomicOr(reinterpret_cast<unsigned long long*>(&groups[current].overflow), 1ull);
      appended = 0;
    }
    __syncthreads();
  });
  flush();
}

// The last block of a group: the chunk in which the ties that stay end, and where in it.
template <typename Key>
__device__ void place_cut(LayerRow* layers, const GroupRow& group, const unsigned* tie_counts, Key infinity) {
  __shared__ int64_t crossing, left;
  int64_t kept = group.num_ties_kept;
  if (threadIdx.x == 0) crossing = -1;
  __syncthreads();
  for (int64_t first = 0; crossing < 0; first += kThreads) {
    const int64_t c = first + threadIdx.x;
    const int64_t ties = c < group.num_chunks ? __ldcg(&tie_counts[group.first_chunk + c]) : 0;
    int64_t total;
    const int64_t before = block_scan(ties, total);
    if (before <= kept && kept < before + ties) {
      crossing = group.first_chunk + c;
      left = kept - before;
    }
    kept -= total;
    __syncthreads();
  }
  const LayerRow* const rows = layers + group.first_layer;
  const int64_t l = row_of(rows, group.num_layers, crossing);
  const LayerRow& row = rows[l];
  const int64_t begin = (crossing - row.first_chunk) * kChunk;
  const int64_t end = begin + kChunk < row.n ? begin + kChunk : row.n;
  int64_t rank = left;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t i = tile + threadIdx.x * kEach;
    const int size = count_from(i, row.n);
    const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), i, size);
    Key raw[kEach];
    load8(pointer<const Key>(row.weights) + i, size, raw);
    unsigned ties = 0;
    for (int j = 0; j < kEach; ++j) {
      ties |= static_cast<unsigned>((bits >> j & 1) && magnitude_key(raw[j], infinity) == static_cast<Key>(group.key))
              << j;
    }
    int64_t total;
    int64_t before = block_scan(static_cast<int64_t>(count_bits(ties)), total);
    for (int j = 0; j < kEach; ++j) {
      if (!(ties >> j & 1)) continue;
      if (before == rank) layers[group.first_layer + l].cut = i + j;
      ++before;
    }
    rank -= total;
  }
  for (int64_t other = threadIdx.x; other < group.num_layers; other += kThreads) {
    if (other < l) layers[group.first_layer + other].cut = rows[other].n;
  }
}

template <typename Key>
__global__ void __launch_bounds__(kThreads) ties(LayerRow* layers, int64_t num_layers, GroupRow* groups,
                                                 int64_t num_chunks, Workspace<Key> space, Key infinity) {
  int64_t current = -1;
  const auto flush = [&] {
    if (current < 0) return;
    GroupRow& group = groups[current];
    if (group.num_ties_kept == 0) return;
    if (is_last_block(&group.blocks_done, num_blocks_of(group, num_chunks))) {
      place_cut<Key>(layers, group, space.tie_counts, infinity);
    }
  };
  for_each_chunk(layers, num_layers, num_chunks, [&](int64_t l, int64_t chunk, int64_t begin, int64_t end) {
    const LayerRow& layer = layers[l];
    if (layer.group != current) {
      flush();
      current = layer.group;
    }
    const GroupRow& group = groups[current];
    if (group.num_ties_kept == 0) return;
    const Key threshold = static_cast<Key>(group.key);
    unsigned matches = 0;
    if (group.listed) {
      const unsigned size = space.list_counts[chunk];
      for (unsigned k = threadIdx.x; k < size; k += kThreads) {
        matches += space.lists[chunk * kListCapacity + k] == threshold;
      }
    } else {
      for (int64_t i = begin + threadIdx.x * kEach; i < end; i += kTile) {
        const int size = count_from(i, layer.n);
        const unsigned bits = load_bits(pointer<const uint8_t>(layer.mask), i, size);
        if (bits == 0) continue;
        Key raw[kEach];
        load8(pointer<const Key>(layer.weights) + i, size, raw);
        for (int j = 0; j < kEach; ++j) matches += (bits >> j & 1) && magnitude_key(raw[j], infinity) == threshold;
      }
    }
    matches = block_sum(matches);
    if (threadIdx.x == 0) space.tie_counts[chunk] = matches;
  });
  flush();
}

}  // namespace gmp::cuda::kernels
