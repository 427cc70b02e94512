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

// A larger sample gives a narrower bracket, and so shorter lists: worth its time where the lists are many.
inline constexpr int64_t kSampleEights = 2048, kLargeSampleEights = 8192;  // at most
inline constexpr int64_t kLargeSampleFrom = int64_t{1} << 28;              // weights
inline constexpr int64_t kSampleShare = 16;                                // of smaller groups one key in so many
// Standard deviations of the wanted key's rank in the sample that lie between it and the edges of the bracket: random
// weights fail in 3 selections of 1000, or 6 of 100000. Many groups get the wider bracket, because one that fails is
// read again by the few blocks that it belongs to while all others wait.
inline constexpr float kDeviations = 3.0f, kDeviationsOfMany = 4.0f;
inline constexpr unsigned kMany = 16;

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
__global__ void __launch_bounds__(kThreads, 2) begin(LayerRow* layers, GroupRow* groups, int64_t num_chunks,
                                                     int64_t num_counting, uint64_t* bins_of_blocks, Key infinity) {
  constexpr int kPerThread = kMostBins / kThreads;
  __shared__ unsigned hist[kMostBins];
  __shared__ Key edges[2];
  GroupRow& group = groups[blockIdx.x];
  const LayerRow* const rows = layers + group.first_layer;
  for (int64_t l = threadIdx.x; l < group.num_layers; l += kThreads) {
    layers[group.first_layer + l].nonfinite = kNoIndex;
    layers[group.first_layer + l].cut = rows[l].n;
  }
  // Where the blocks that count this group will add their bins up.
  uint64_t* const own = bins_of_blocks + block_of(group.first_chunk, num_chunks, num_counting) * kBins;
  for (int64_t b = threadIdx.x; b < kBins; b += kThreads) own[b] = 0;
  uint64_t lo = group.lo, hi = group.hi;
  if (hi == 0) {
    const SampleBins<Key> bins(infinity);
    for (int64_t b = threadIdx.x; b < kMostBins; b += kThreads) hist[b] = 0;
    if (threadIdx.x < 2) edges[threadIdx.x] = threadIdx.x == 0 ? Key(0) : static_cast<Key>(infinity + 1);
    __syncthreads();

    // Eights at pseudo-random places of evenly spread chunks: in step with no period of the weights. All that a thread
    // asks for at a time is under way together.
    constexpr int kAtOnce = 32 / sizeof(Key);
    const int64_t most = group.n < kLargeSampleFrom ? kSampleEights : kLargeSampleEights;
    const int64_t share = group.n / kEach / kSampleShare + 1;
    const int64_t eights = share < most ? share : most;
    const uint64_t step = (static_cast<uint64_t>(group.num_chunks) << 32) / static_cast<uint64_t>(eights);
    unsigned sampled = 0, pruned = 0;
    for (int64_t first = threadIdx.x; first < eights; first += kAtOnce * kThreads) {
      Key raw[kAtOnce][kEach];
      unsigned bits[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const uint64_t e = static_cast<uint64_t>(first) + u * kThreads;
        const bool is_one = static_cast<int64_t>(e) < eights;
        const int64_t chunk = group.first_chunk + (is_one ? static_cast<int64_t>(e * step >> 32) : 0);
        const LayerRow& row = rows[row_of(rows, group.num_layers, chunk)];
        const int64_t start = (chunk - row.first_chunk) * kChunk;
        uint64_t random = (e + 1) * 0x9e3779b97f4a7c15ull;
        random = (random ^ random >> 29) * 0xbf58476d1ce4e5b9ull >> 32;
        const int64_t num_eights = (size_of_chunk(row.n, start) + kEach - 1) / kEach;
        const int64_t i = start + static_cast<int64_t>(random * static_cast<uint64_t>(num_eights) >> 32) * kEach;
        const int count = is_one ? count_from(i, row.n) : 0;
        bits[u] = load_bits(pointer<const uint8_t>(row.mask), i, count);
        load8(pointer<const Key>(row.weights) + i, count, raw[u]);
        sampled += count;
        pruned += count - count_bits(bits[u]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (bits[u] >> j & 1) atomicAdd(&hist[bins.bin(magnitude_key(raw[u][j], infinity))], 1u);
        }
      }
    }
    sampled = block_sum(sampled);
    pruned = block_sum(pruned);  // and all of hist is there

    const float wanted = static_cast<float>(static_cast<double>(group.num_prune) / static_cast<double>(group.n));
    const float rank = wanted * static_cast<float>(sampled);
    const float half = 2.0f + (gridDim.x < kMany ? kDeviations : kDeviationsOfMany) * sqrtf(rank * (1.0f - wanted));
    unsigned counts[kPerThread], sum = 0, total;
#pragma unroll
    for (int b = 0; b < kPerThread; ++b) sum += counts[b] = hist[threadIdx.x * kPerThread + b];
    const unsigned before = pruned + block_scan(sum, total);
    const Key largest = static_cast<Key>(infinity + 1);
    for (int side = 0; side < 2; ++side) {
      const float edge = side == 0 ? rank - half : rank + half;
      if (edge < static_cast<float>(pruned) || edge >= static_cast<float>(sampled)) continue;
      const Crossing crossing(counts, before, static_cast<unsigned>(edge));
      if (crossing.bin < 0) continue;
      // As if the keys of a bin were evenly spread in it: bins are wider than brackets are to be.
      const Key lower = bins.lower(crossing.bin), upper = bins.upper(crossing.bin, largest);
      const bool is_bounded = crossing.bin > 0 && crossing.bin < kMostBins - 1;
      const unsigned from = static_cast<unsigned>(edge) - crossing.before;
      const auto at = [&](unsigned k) {
        return static_cast<Key>(static_cast<double>(upper - lower) * k / crossing.count);
      };
      edges[side] = side == 0    ? is_bounded ? static_cast<Key>(lower + at(from)) : lower
                    : is_bounded ? static_cast<Key>(lower + at(from + 1))
                                 : upper;
    }
    __syncthreads();
    lo = edges[0];
    hi = edges[1];
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
__device__ void narrow(LayerRow* layers, GroupRow& group, bool counts_each, Key infinity, Take take) {
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
        group.listed = !listed ? kNotListed : counts_each ? kCounts : kKeys;
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

// Calls visit(key, l) for all that is listed of the chunks [first, last), and done(chunk, l) behind the last key of
// each. A warp takes a run of chunks, of which it looks up 32 sizes at once; kLists lists are under way together, by l.
inline constexpr int kLists = 4;
template <typename Key, typename Visit, typename Done>
__device__ __forceinline__ void for_each_listed(const Workspace& space, int first, int last, Visit visit, Done done) {
  constexpr int kParts = 4;  // keys of each list that a lane has under way
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = kWarps;
  const int until = first + static_cast<int>(int64_t{warp + 1} * (last - first) / warps);
  for (int base = first + static_cast<int>(int64_t{warp} * (last - first) / warps); base < until; base += kWarpSize) {
    const unsigned sizes = base + lane < until ? pointer<const unsigned>(space.list_counts)[base + lane] : 0;
    for (int c = 0; c < static_cast<int>(kWarpSize) && base + c < until; c += kLists) {
      const Key* const lists = pointer<const Key>(space.lists) + (base + c) * space.capacity;
      int size[kLists], longest = 0;
#pragma unroll
      for (int l = 0; l < kLists; ++l) {
        size[l] = static_cast<int>(__shfl_sync(~0u, sizes, c + l));
        longest = size[l] > longest ? size[l] : longest;
      }
#pragma unroll 1
      for (int k = lane; k - lane < longest; k += kParts * static_cast<int>(kWarpSize)) {
        Key keys[kLists][kParts] = {};
#pragma unroll
        for (int l = 0; l < kLists; ++l) {
#pragma unroll
          for (int u = 0; u < kParts; ++u) {
            const int own = k + u * static_cast<int>(kWarpSize);
            if (own < size[l]) keys[l][u] = load1(lists + l * space.capacity + own);
          }
        }
#pragma unroll
        for (int l = 0; l < kLists; ++l) {
#pragma unroll
          for (int u = 0; u < kParts; ++u) {
            if (k + u * static_cast<int>(kWarpSize) < size[l]) visit(keys[l][u], l);
          }
        }
      }
#pragma unroll
      for (int l = 0; l < kLists; ++l) {
        if (base + c + l < until) done(base + c + l, l);
      }
    }
  }
}

template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders)
    count(LayerRow* layers, GroupRow* groups, int64_t num_groups, int64_t num_chunks, Workspace space, Key infinity) {
  __shared__ Counts<Key> shared;
  Counter<Key> counter(shared, space.capacity, infinity);
  for_each_run(groups, num_groups, num_chunks, [&](int g, int first, int last) {
    GroupRow& group = groups[g];
    const int64_t mode = group.mode;
    if (mode == kDone) return;
    counter.aim(group.lo, group.hi, group.shift, mode == kRead);
    if (mode == kList) {
      for_each_listed<Key>(space, first, last, [&](Key key, int) { counter.take_listed(key); }, [](int, int) {});
    } else {
      LayerRow* const rows = layers + group.first_layer;
      for_each_run(rows, group.num_layers, first, last, [&](int l, int from, int until) {
        LayerRow& layer = rows[l];
        const int64_t begin = (from - layer.first_chunk) * kChunk;
        count_chunks(
            layer.weights, layer.mask, layer.touched, layer.n, begin, until - from, counter, [](Key) {},
            [&](int c) { end_chunk(counter, layer, begin + c * kChunk, group, space, from + c); });
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
    narrow(layers, group, counter.counts_each(), infinity,
           [&](int64_t b) -> unsigned long long { return num_blocks > 1 ? take_bin(bins + b) : counter.take_bin(b); });
  });
}

// Where a running sum of counts first exceeds `rank`, which is less than their sum; the whole block comes here. Gives
// the position, and takes what comes before it from the rank; -1 if the sum is no larger.
template <typename CountAt>
__device__ int64_t find_crossing(int64_t size, int64_t& rank, CountAt count_at) {
  __shared__ int64_t crossing, left;
  constexpr int kCounts = 8;  // of each thread at a time
  if (threadIdx.x == 0) crossing = -1;
  __syncthreads();
  for (int64_t first = 0; crossing < 0 && first < size; first += kCounts * kThreads) {
    const int64_t own = first + threadIdx.x * kCounts;
    int64_t counts[kCounts], sum = 0, total;
#pragma unroll
    for (int c = 0; c < kCounts; ++c) sum += counts[c] = own + c < size ? count_at(own + c) : 0;
    int64_t before = block_scan(sum, total);
#pragma unroll
    for (int c = 0; c < kCounts; ++c) {
      if (before <= rank && rank < before + counts[c]) {
        crossing = own + c;
        left = rank - before;
      }
      before += counts[c];
    }
    rank -= total;
    __syncthreads();
  }
  const int64_t found = crossing;
  if (found >= 0) rank = left;
  __syncthreads();  // both are used again
  return found;
}

// Which of the 64 weights from `begin` on, or fewer, tie.
template <typename Key>
__device__ uint64_t ties_of(const LayerRow& layer, int64_t begin, Key threshold, Key infinity) {
  const int64_t left = layer.n - begin;
  const int size = left < 0 ? 0 : left < 64 ? static_cast<int>(left) : 64;
  uint64_t ties = 0;
#pragma unroll 2
  for (int e = 0; e < 64 / kEach; ++e) {
    Key raw[kEach];
    load8(pointer<const Key>(layer.weights) + begin + e * kEach, count_from(e * kEach, size), raw);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      ties |= static_cast<uint64_t>(magnitude_key(raw[j], infinity) == threshold) << (e * kEach + j);
    }
  }
  return ties & load_word(pointer<const uint8_t>(layer.mask), begin, size);
}

// The last block of a group: the block, the chunk and the weight from which on ties go.
template <typename Key>
__device__ void place_cut(LayerRow* layers, const GroupRow& group, const uint64_t* block_ties,
                          const unsigned* tie_counts, int64_t num_chunks, Key infinity) {
  static_assert(kChunk == 64 * kThreads);
  int64_t rank = group.num_ties_kept;
  const int64_t first_block = block_of(group.first_chunk, num_chunks);
  const int64_t block = find_crossing(num_blocks_of(group, num_chunks), rank,
                                      [&](int64_t b) { return static_cast<int64_t>(__ldcg(&block_ties[b])); });
  if (block < 0) return;  // the weights have changed meanwhile
  const int64_t from = first_chunk_of(first_block + block, num_chunks);
  const int64_t first = from < group.first_chunk ? group.first_chunk : from;
  const int64_t until = first_chunk_of(first_block + block + 1, num_chunks), end = group.first_chunk + group.num_chunks;
  const int64_t found = find_crossing((until < end ? until : end) - first, rank,
                                      [&](int64_t c) { return int64_t{__ldcg(&tie_counts[first + c])}; });
  if (found < 0) return;
  const int64_t chunk = first + found;
  const LayerRow* const rows = layers + group.first_layer;
  const int64_t l = row_of(rows, group.num_layers, chunk);
  const LayerRow& row = rows[l];
  const int64_t begin = (chunk - row.first_chunk) * kChunk + threadIdx.x * 64;
  uint64_t ties = ties_of(row, begin, static_cast<Key>(group.key), infinity);
  int64_t total;
  const int64_t before = block_scan(static_cast<int64_t>(count_word(ties)), total);
  if (before <= rank && rank < before + count_word(ties)) {
    for (int64_t skip = rank - before; skip > 0; --skip) ties &= ties - 1;
    layers[group.first_layer + l].cut = begin + lowest_of(ties);
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
    unsigned long long sum = 0;
    const auto leave = [&](int chunk, unsigned matches) {
      matches = warp_sum(matches);
      if (threadIdx.x % kWarpSize != 0) return;
      tie_counts[chunk] = matches;
      sum += matches;
    };
    if (group.listed == kCounts) {
      const Key* const counts = pointer<const Key>(space.lists) + (group.key - group.lo);
      for (int chunk = first + static_cast<int>(threadIdx.x); chunk < last; chunk += kThreads) {
        tie_counts[chunk] = load1(counts + chunk * space.capacity);
        sum += tie_counts[chunk];
      }
    } else if (group.listed == kKeys) {
      unsigned matches[kLists] = {};
      for_each_listed<Key>(
          space, first, last, [&](Key key, int l) { matches[l] += key == threshold; },
          [&](int chunk, int l) {
            leave(chunk, matches[l]);
            matches[l] = 0;
          });
    } else {
      const LayerRow* const rows = layers + group.first_layer;
      for (int chunk = first + static_cast<int>(threadIdx.x / kWarpSize); chunk < last; chunk += kWarps) {
        const LayerRow& layer = rows[row_of(rows, group.num_layers, chunk)];
        leave(chunk, ties_in(layer, (chunk - layer.first_chunk) * kChunk, threshold, infinity));
      }
    }
    // Where the bins of this group were: no other group with several blocks has its first one in common with it.
    const int64_t first_block = block_of(group.first_chunk, num_chunks);
    uint64_t* const block_ties = pointer<uint64_t>(space.bins) + first_block * kBins;
    sum = block_sum(sum);
    if (threadIdx.x == 0) block_ties[blockIdx.x - first_block] = sum;
    if (is_last_block(&group.blocks_done, num_blocks_of(group, num_chunks))) {
      place_cut<Key>(layers, group, block_ties, tie_counts, num_chunks, infinity);
    }
    __syncthreads();
  });
}

}  // namespace gmp::cuda::kernels
