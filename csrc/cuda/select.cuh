// Exact selection for all layers in a fixed number of launches: begin, count (some times), ties.
//
//   begin  a sample of each group's keys gives the bracket [lo, hi], unless the caller did
//   count  the first one reads every weight once: how many keys lie below the bracket, a histogram of those inside, and
//          the keys themselves in a short list per chunk. The last block of a group checks the proof,
//          below < wanted <= below + inside, and narrows the bracket to the bin with the wanted key. Further ones read
//          the lists; where the proof failed or a list overflowed, all weights again; where all is done, nothing.
//   ties   finds the index at which the tied weights that stay end
//
// Nothing here depends on the order in which blocks run: all sums are of integers, lists are used as sets.
// Source: Floyd and Rivest, CACM 18(3), 1975, as streamed by GPU top-k selections; histograms as in radix selection.
#pragma once

#include "count.cuh"

namespace gmp::cuda::kernels {

inline constexpr int64_t kSampleEights = 8192;  // at most: 65536 keys
inline constexpr int64_t kSampleShare = 16;     // of smaller groups one key in so many

// Keys in 2048 bins that saturate: 64 to the octave from 2^-24 on for wide keys, one per key from 2^-13 on for
// bfloat16.
template <typename Key>
struct SampleBins {
  Key base;
  int shift;

  __device__ explicit SampleBins(Key infinity) {
    const int mantissa = sizeof(Key) == 8 ? 52 : sizeof(Key) == 4 ? 23 : infinity == Key(0x7c00) ? 10 : 7;
    const int64_t bias = (static_cast<int64_t>(infinity) >> mantissa) / 2;
    const int resolution = mantissa == 7 ? 7 : 6;  // bits of the mantissa that a bin tells apart
    const int64_t below_one = mantissa == 7 ? 13 : 24;
    base = bias > below_one ? static_cast<Key>((bias - below_one) << mantissa) : Key(0);
    shift = mantissa - resolution;
  }
  __device__ int64_t bin(Key key) const {
    const int64_t d = key < base ? 0 : static_cast<int64_t>(static_cast<Key>(key - base) >> shift);
    return d < kMostBins ? d : kMostBins - 1;
  }
  __device__ Key lower(int64_t bin) const {
    return bin == 0 ? Key(0) : static_cast<Key>(base + (static_cast<Key>(bin) << shift));
  }
  __device__ Key upper(int64_t bin, Key largest) const {
    return bin == kMostBins - 1 ? largest : static_cast<Key>(lower(bin + 1) - 1);
  }
};

// Smallest shift that maps [lo, hi] into the bins.
__device__ inline int64_t shift_of(uint64_t lo, uint64_t hi) {
  int64_t shift = 0;
  while ((hi - lo) >> shift >= static_cast<uint64_t>(kBins)) ++shift;
  return shift;
}

// The bin where the running sum of counts first exceeds `rank`; each thread has kCount of them in a row.
template <typename Count, int kCount>
struct Crossing {
  int64_t bin = -1;             // -1: it is another thread's
  Count before = 0, count = 0;  // of the bins before it, and its own

  __device__ __forceinline__ Crossing(const Count (&counts)[kCount], Count running, Count rank) {
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      if (running <= rank && rank < running + counts[b]) {
        bin = threadIdx.x * kCount + b;
        before = running;
        count = counts[b];
      }
      running += counts[b];
    }
  }
};

__device__ inline int64_t num_blocks_of(const GroupRow& group, int64_t num_chunks) {
  return block_of(group.first_chunk + group.num_chunks - 1, num_chunks) - block_of(group.first_chunk, num_chunks) + 1;
}

// One block per group. With room for more of them to a multiprocessor, the compiler would have registers spilled.
template <typename Key>
__global__ void __launch_bounds__(kThreads, 2) begin(LayerRow* layers, GroupRow* groups, Key infinity) {
  constexpr int kPerThread = kMostBins / kThreads;
  __shared__ unsigned hist[kMostBins];
  __shared__ int64_t edges[2];
  GroupRow& group = groups[blockIdx.x];
  const LayerRow* const rows = layers + group.first_layer;
  for (int64_t l = threadIdx.x; l < group.num_layers; l += kThreads) {
    layers[group.first_layer + l].nonfinite = kNoIndex;
    layers[group.first_layer + l].cut = rows[l].n;
  }
  uint64_t lo = group.lo, hi = group.hi;
  if (hi == 0) {
    const SampleBins<Key> bins(infinity);
    for (int64_t b = threadIdx.x; b < kMostBins; b += kThreads) hist[b] = 0;
    if (threadIdx.x < 2) edges[threadIdx.x] = threadIdx.x == 0 ? 0 : kMostBins - 1;
    __syncthreads();

    // Eights at pseudo-random places of evenly spread chunks: in step with no period of the weights.
    const int64_t share = group.n / kEach / kSampleShare + 1;
    const int64_t eights = share < kSampleEights ? share : kSampleEights;
    unsigned sampled = 0, pruned = 0;
#pragma unroll 4
    for (int64_t e = threadIdx.x; e < eights; e += kThreads) {
      const int64_t chunk = group.first_chunk + e * group.num_chunks / eights;
      const LayerRow& row = rows[row_of(rows, group.num_layers, chunk)];
      const int64_t start = (chunk - row.first_chunk) * kChunk;
      const int64_t size = row.n - start < kChunk ? row.n - start : kChunk;
      uint64_t random = static_cast<uint64_t>(e + 1) * 0x9e3779b97f4a7c15ull;
      random ^= random >> 29;
      const int64_t i =
          start + static_cast<int64_t>(random * 0xbf58476d1ce4e5b9ull >> 33) % ((size + kEach - 1) / kEach) * kEach;
      const int count = count_from(i, row.n);
      const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), i, count);
      Key raw[kEach];
      load8(pointer<const Key>(row.weights) + i, count, raw);
      sampled += count;
      pruned += count - count_bits(bits);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (bits >> j & 1) atomicAdd(&hist[bins.bin(magnitude_key(raw[j], infinity))], 1u);
      }
    }
    sampled = block_sum(sampled);
    pruned = block_sum(pruned);  // and all of hist is there

    const float wanted = static_cast<float>(static_cast<double>(group.num_prune) / static_cast<double>(group.n));
    const float rank = wanted * static_cast<float>(sampled);
    const float half =
        2.0f + 3.0f * sqrtf(rank * (1.0f - wanted));  // fails in 3 selections of 1000, for random weights
    unsigned counts[kPerThread], sum = 0, total;
#pragma unroll
    for (int b = 0; b < kPerThread; ++b) sum += counts[b] = hist[threadIdx.x * kPerThread + b];
    const unsigned before = pruned + block_scan(sum, total);
    for (int side = 0; side < 2; ++side) {
      const float edge = side == 0 ? rank - half : rank + half;
      if (edge < static_cast<float>(pruned) || edge >= static_cast<float>(sampled)) continue;
      const Crossing crossing(counts, before, static_cast<unsigned>(edge));
      if (crossing.bin >= 0) edges[side] = crossing.bin;
    }
    __syncthreads();
    const Key largest = static_cast<Key>(infinity + 1);
    lo = bins.lower(edges[0]);
    hi = bins.upper(edges[1], largest);
    if (rank + half < static_cast<float>(pruned)) hi = bins.upper(0, largest);  // all that is wanted is pruned
  }
  if (threadIdx.x > 0) return;
  group.lo = lo;
  group.hi = hi;
  group.shift = shift_of(lo, hi);
  group.mode = kRead;
  group.passes = group.below = group.pruned = group.overflow = group.listed = group.blocks_done = 0;
}

// Gives a bin that other blocks have added to, and empties it.
__device__ inline unsigned long long take_bin(unsigned long long* bin) {
  const unsigned long long count = __ldcg(bin);
  *bin = 0;
  return count;
}

// Proves the bracket of a group by what was counted, and narrows it. take(bin) gives a count and sets it to zero.
template <typename Key, typename Take>
__device__ void narrow(LayerRow* layers, GroupRow& group, Key infinity, Take take) {
  constexpr int kPerThread = kBins / kThreads;
  __shared__ bool finished;
  const uint64_t lo = group.lo, hi = group.hi;
  const int64_t shift = group.shift;
  const int64_t below = __ldcg(&group.below), pruned = __ldcg(&group.pruned);
  const bool listed = group.mode == kList || __ldcg(&group.overflow) == 0;
  const int64_t wanted = group.num_prune - pruned;  // rank, from 1, among the unpruned
  unsigned long long counts[kPerThread], sum = 0, inside;
#pragma unroll
  for (int b = 0; b < kPerThread; ++b) sum += counts[b] = take(threadIdx.x * kPerThread + b);
  const unsigned long long before = block_scan(sum, inside);  // and all have read what is written from here on
  const bool proven = wanted > below && wanted <= below + static_cast<int64_t>(inside);
  if (threadIdx.x == 0) finished = wanted <= 0;  // and nobody looks at that of an earlier call any more
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
      group.mode = kRead;
    }
  } else {
    const Crossing crossing(counts, before, static_cast<unsigned long long>(wanted - below - 1));
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
        group.mode = listed ? kList : kRead;
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
    group.overflow = group.blocks_done = 0;
  }
}

// Adds what a block has found of a group in its first read to that of the others.
template <typename Key>
__device__ void add_sums(GroupRow& group, const Counter<Key>& counter) {
  const auto below = block_sum(static_cast<unsigned long long>(counter.below));
  const auto pruned = block_sum(static_cast<unsigned long long>(counter.pruned));
  if (threadIdx.x > 0) return;
  atomicAdd(counter_at(&group.below), below);
  atomicAdd(counter_at(&group.pruned), pruned);
}

// Ends a chunk that has been read; `number` is the chunk's.
template <typename Key>
__device__ __forceinline__ void end_chunk(Counter<Key>& counter, LayerRow& layer, int64_t begin, GroupRow& group,
                                          const Workspace& space, int number) {
  Key* const list = pointer<Key>(space.lists) + number * space.capacity;
  if (counter.report_nonfinite(&layer.nonfinite, begin)) *pointer<int64_t>(space.nonfinite) = 1;
  const unsigned inside = counter.end_chunk([&](unsigned k, Key key) { store1(list + k, key); });
  if (threadIdx.x > 0) return;
  pointer<unsigned>(space.list_counts)[number] = inside;
  if (inside > space.capacity) atomicOr(counter_at(&group.overflow), 1ull);
}

// Calls visit(key) for all that is listed of the chunks [first, last), and done(chunk) behind the last key of each. A
// warp takes a run of chunks, of which it looks up 32 sizes at once: so that many lists are under way, not one.
template <typename Key, typename Visit, typename Done>
__device__ __forceinline__ void for_each_listed(const Workspace& space, int first, int last, Visit visit, Done done) {
  constexpr unsigned kAtOnce = 4;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = kWarps;
  const int until = first + static_cast<int>(int64_t{warp + 1} * (last - first) / warps);
  for (int base = first + static_cast<int>(int64_t{warp} * (last - first) / warps); base < until; base += kWarpSize) {
    const unsigned sizes = base + lane < until ? pointer<const unsigned>(space.list_counts)[base + lane] : 0;
    for (int c = 0; c < static_cast<int>(kWarpSize) && base + c < until; ++c) {
      const unsigned size = __shfl_sync(~0u, sizes, c);
      const Key* const list = pointer<const Key>(space.lists) + (base + c) * space.capacity;
      for (unsigned k = lane; k < size; k += kAtOnce * kWarpSize) {
        Key keys[kAtOnce] = {};
#pragma unroll
        for (unsigned u = 0; u < kAtOnce; ++u) {
          if (k + u * kWarpSize < size) keys[u] = load1(list + k + u * kWarpSize);
        }
#pragma unroll
        for (unsigned u = 0; u < kAtOnce; ++u) {
          if (k + u * kWarpSize < size) visit(keys[u]);
        }
      }
      done(base + c);
    }
  }
}

template <typename Key>
__global__ void GMP_REGISTERS((sizeof(Key) == 8 ? 80 : 72), 80)
    count(LayerRow* layers, GroupRow* groups, int64_t num_groups, int64_t num_chunks, Workspace space, Key infinity) {
  __shared__ Counts<Key> shared;
  Counter<Key> counter(shared, space.capacity, infinity);
  for_each_run(groups, num_groups, num_chunks, [&](int g, int first, int last) {
    GroupRow& group = groups[g];
    const int64_t mode = group.mode;
    if (mode == kDone) return;
    counter.aim(group.lo, group.hi, group.shift);
    if (mode == kList) {
      for_each_listed<Key>(space, first, last, [&](Key key) { counter.take_listed(key); }, [](int) {});
    } else {
      LayerRow* const rows = layers + group.first_layer;
      for_each_run(rows, group.num_layers, first, last, [&](int l, int from, int until) {
        LayerRow& layer = rows[l];
        for (int chunk = from; chunk < until; ++chunk) {
          const int64_t begin = (chunk - layer.first_chunk) * kChunk;
          count_chunk(layer.weights, layer.mask, layer.touched, layer.n, begin, counter, [](Key) {});
          end_chunk(counter, layer, begin, group, space, chunk);
        }
      });
      if (group.passes == 0) add_sums(group, counter);
    }
    __syncthreads();
    const int64_t num_blocks = num_blocks_of(group, num_chunks);
    // No two groups that go on in another block begin in the same one.
    auto* const bins = pointer<unsigned long long>(space.bins) + block_of(group.first_chunk, num_chunks) * kBins;
    if (num_blocks > 1) {
      counter.move_bins(bins, kBins);
      if (!is_last_block(&group.blocks_done, num_blocks)) return;
    }
    narrow(layers, group, infinity,
           [&](int64_t b) -> unsigned long long { return num_blocks > 1 ? take_bin(bins + b) : counter.take_bin(b); });
  });
}

// The last block of a group: the chunk in which the ties that stay end, and where in it.
template <typename Key>
__device__ void place_cut(LayerRow* layers, const GroupRow& group, const unsigned* tie_counts, Key infinity) {
  __shared__ int64_t crossing, left;
  int64_t kept = group.num_ties_kept;
  if (threadIdx.x == 0) crossing = -1;
  __syncthreads();
  constexpr int kCounts = 8;  // of each thread at a time
  for (int64_t first = 0; crossing < 0 && first < group.num_chunks; first += kCounts * kThreads) {
    const int64_t own = first + threadIdx.x * kCounts;
    unsigned counts[kCounts];
    int64_t ties = 0;
#pragma unroll
    for (int c = 0; c < kCounts; ++c) {
      counts[c] = own + c < group.num_chunks ? __ldcg(&tie_counts[group.first_chunk + own + c]) : 0;
      ties += counts[c];
    }
    int64_t total;
    int64_t before = block_scan(ties, total);
#pragma unroll
    for (int c = 0; c < kCounts; ++c) {
      if (before <= kept && kept < before + counts[c]) {
        crossing = group.first_chunk + own + c;
        left = kept - before;
      }
      before += counts[c];
    }
    kept -= total;
    __syncthreads();
  }
  if (crossing < 0) return;  // the weights have changed meanwhile
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

// How many weights of the chunk that begins at `begin` tie; a warp comes here.
template <typename Key>
__device__ __forceinline__ unsigned ties_in(const LayerRow& layer, int64_t begin, Key threshold, Key infinity) {
  const Key* const weights = pointer<const Key>(layer.weights) + begin;
  const uint8_t* const mask = layer.mask == 0 ? nullptr : pointer<const uint8_t>(layer.mask) + begin / 8;
  const int size = size_of_chunk(layer.n, begin);
  unsigned matches = 0;
  for (int i = static_cast<int>(threadIdx.x % kWarpSize) * kEach; i < size; i += kTouchedBy) {
    const int there = count_from(i, size);
    const unsigned bits = load_bits(mask, i, there);
    Key raw[kEach] = {};
    load8(weights + i, bits != 0 ? there : 0, raw);
#pragma unroll
    for (int j = 0; j < kEach; ++j) matches += (bits >> j & 1) && magnitude_key(raw[j], infinity) == threshold;
  }
  return matches;
}

template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders)
    ties(LayerRow* layers, GroupRow* groups, int64_t num_groups, int64_t num_chunks, Workspace space, Key infinity) {
  unsigned* const tie_counts = pointer<unsigned>(space.tie_counts);
  for_each_run(groups, num_groups, num_chunks, [&](int g, int first, int last) {
    GroupRow& group = groups[g];
    if (group.num_ties_kept == 0) return;
    const Key threshold = static_cast<Key>(group.key);
    unsigned matches = 0;
    const auto leave = [&](int chunk) {
      matches = warp_sum(matches);
      if (threadIdx.x % kWarpSize == 0) tie_counts[chunk] = matches;
      matches = 0;
    };
    if (group.listed) {
      for_each_listed<Key>(space, first, last, [&](Key key) { matches += key == threshold; }, leave);
    } else {
      const LayerRow* const rows = layers + group.first_layer;
      for (int chunk = first + static_cast<int>(threadIdx.x / kWarpSize); chunk < last; chunk += kWarps) {
        const LayerRow& layer = rows[row_of(rows, group.num_layers, chunk)];
        matches = ties_in(layer, (chunk - layer.first_chunk) * kChunk, threshold, infinity);
        leave(chunk);
      }
    }
    if (is_last_block(&group.blocks_done, num_blocks_of(group, num_chunks))) {
      place_cut<Key>(layers, group, tie_counts, infinity);
    }
  });
}

}  // namespace gmp::cuda::kernels
