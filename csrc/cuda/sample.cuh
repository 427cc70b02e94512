// A sample of each group's keys, and the bracket that follows from it.
#pragma once

#include "counter.cuh"
#include "deal.cuh"
#include "search/sample.h"

namespace gmp::cuda::kernels {

// A larger sample gives a narrower bracket, and so shorter lists. It is worth its time if there are many lists, or if
// those of a smaller sample would overflow.
inline constexpr int64_t kSampleEights = 2048, kLargeSampleEights = 8192;  // at most
inline constexpr int64_t kLargeSampleFrom = int64_t{1} << 28;              // weights
inline constexpr int64_t kSampleShare = 4;  // beyond the first 2048, a sample has at most one in so many eights
// Distance of the wanted key's rank in the sample from the edges of the bracket, in standard deviations: for random
// weights 3 selections in 1000 fail, or 6 in 100000. With many groups the wider bracket is used, because a group that
// fails is read again by its few blocks while all others wait.
inline constexpr float kDeviations = 3.0f, kDeviationsOfMany = 4.0f;
inline constexpr unsigned kMany = 16;
// A list needs room for the number of keys that a chunk is expected to have in the bracket, and for so many square
// roots of that number more. The actual number has a standard deviation of one root, the expectation one of at most
// another, and the bracket's ends are interpolated: together less than 1.5 roots, so that 8 are more than 5 deviations.
inline constexpr float kSpareRoots = 8.0f;
inline constexpr float kUnevenLayers = 2.0f;  // keys inside per chunk, in the layer with most of them, over the average

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
  __device__ int bin(Key key) const {
    constexpr Key kLast = static_cast<Key>(kMostBins - 1);
    const Key d = key < base ? Key(0) : static_cast<Key>(static_cast<Key>(key - base) >> shift);
    return static_cast<int>(d < kLast ? d : kLast);
  }
  __device__ Key lower(int64_t bin) const {
    return bin == 0 ? Key(0) : static_cast<Key>(base + (static_cast<Key>(bin) << shift));
  }
  __device__ Key upper(int64_t bin, Key largest) const {
    if (bin == kMostBins - 1) return largest;
    const Key last = static_cast<Key>(lower(bin + 1) - 1);
    return last < largest ? last : largest;  // the key of NaN, as the bin also has bit patterns that are no keys
  }
};

// The place where the blocks that count a group add up their bins. There is one place per group or, if there are more
// groups than blocks, one per block in which a group begins. Two groups that continue in another block never begin in
// the same one, because the later group begins after all chunks of the earlier one.
__device__ inline unsigned long long* bins_of(const Tables& tables, const GroupRow& group, int64_t g, const Deal& deal,
                                              int64_t num_blocks) {
  const int64_t place = tables.num_groups <= num_blocks ? g : deal.block_of(group.first_chunk, g);
  return pointer<unsigned long long>(tables.bins) + place * kBins;
}

// Whether the lists have room for the keys that a chunk is likely to have between two ranks of the sample. Pruned
// weights come first in the sample, and are in no list.
__device__ inline bool fits(const GroupRow& group, float first, float last, unsigned pruned, unsigned sampled,
                            int64_t capacity) {
  const float all = static_cast<float>(sampled);
  const float inside = fmaxf(0.0f, fminf(last, all) - fmaxf(first, static_cast<float>(pruned)));
  const float average = inside / all * static_cast<float>(kChunk);
  const float expected = group.num_layers > 1 ? kUnevenLayers * average : average;
  return highest_count(expected, kSpareRoots) <= static_cast<float>(capacity);
}

// One block per group. With more blocks per multiprocessor, the compiler would spill registers.
template <typename Key>
__global__ void __launch_bounds__(kThreads, 2) begin(Tables tables, int64_t num_counting, Key infinity) {
  constexpr int kPerThread = kMostBins / kThreads;
  __shared__ unsigned hist[kMostBins];
  __shared__ Key edges[2];
  GroupRow& group = pointer<GroupRow>(tables.groups)[blockIdx.x];
  LayerRow* const rows = pointer<LayerRow>(tables.layers) + group.first_layer;
  for (int64_t l = threadIdx.x; l < group.num_layers; l += kThreads) {
    rows[l].nonfinite = kNoIndex;
    rows[l].cut = rows[l].n;
  }
  auto* const own = bins_of(tables, group, blockIdx.x, Deal(tables, num_counting), num_counting);
  for (int64_t b = threadIdx.x; b < kBins; b += kThreads) own[b] = 0;
  uint64_t lo = group.lo, hi = group.hi;
  if (hi == 0) {
    const SampleBins<Key> bins(infinity);
    for (int64_t b = threadIdx.x; b < kMostBins; b += kThreads) hist[b] = 0;
    if (threadIdx.x < 2) edges[threadIdx.x] = threadIdx.x == 0 ? Key(0) : static_cast<Key>(infinity + 1);
    __syncthreads();

    // Eights at pseudo-random places of evenly spread chunks, which are not in step with any period of the weights. A
    // thread starts several loads before it uses the first.
    constexpr int kAtOnce = 32 / sizeof(Key);
    const float wanted = static_cast<float>(static_cast<double>(group.num_prune) / static_cast<double>(group.n));
    // A group of one chunk is read in full: its bracket is then a bin or two, while that of a sample would be wide.
    const bool is_whole = group.num_chunks == 1;
    const int64_t all = (group.n + kEach - 1) / kEach;
    const int64_t share = all / kSampleShare < kLargeSampleEights ? all / kSampleShare : kLargeSampleEights;
    const int64_t small = all < kSampleEights ? all : kSampleEights;
    const int64_t most = share > small ? share : small;
    // 16-bit keys get no smaller sample: with a wider bracket, more of them would be counted one by one, which is
    // slower.
    int64_t taken = 0, eights = group.n >= kLargeSampleFrom ? most : small;
    unsigned sampled = 0, pruned = 0;
    float rank, half;
    while (true) {
      const uint64_t step = (static_cast<uint64_t>(group.num_chunks) << 32) / static_cast<uint64_t>(eights - taken);
      unsigned own_sampled = 0, own_pruned = 0;
      for (int64_t first = taken + threadIdx.x; first < eights; first += kAtOnce * kThreads) {
        Key raw[kAtOnce][kEach];
        unsigned bits[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
          const uint64_t e = static_cast<uint64_t>(first) + u * kThreads;
          const bool is_one = static_cast<int64_t>(e) < eights;
          const int64_t chunk = group.first_chunk + (is_one ? static_cast<int64_t>((e - taken) * step >> 32) : 0);
          const LayerRow& row = rows[row_of(rows, group.num_layers, chunk)];
          const int64_t start = (chunk - row.first_chunk) * kChunk;
          uint64_t random = (e + 1) * 0x9e3779b97f4a7c15ull;
          random = (random ^ random >> 29) * 0xbf58476d1ce4e5b9ull >> 32;
          const int64_t num_eights = (size_of_chunk(row.n, start) + kEach - 1) / kEach;
          const uint64_t place = is_whole ? e : random * static_cast<uint64_t>(num_eights) >> 32;
          const int64_t i = start + static_cast<int64_t>(place) * kEach;
          const int count = is_one ? count_from(i, row.n) : 0;
          bits[u] = load_bits(pointer<const uint8_t>(row.mask), i, count);
          load8(pointer<const Key>(row.weights) + i, count, raw[u]);
          own_sampled += count;
          own_pruned += count - __popc(bits[u]);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) {
            if (bits[u] >> j & 1) atomicAdd(&hist[bins.bin(magnitude_key(raw[u][j], infinity))], 1u);
          }
        }
      }
      sampled += block_sum(own_sampled);
      pruned += block_sum(own_pruned);  // and all of hist is there
      rank = wanted * static_cast<float>(sampled);
      half = is_whole ? 1.0f : rank_margin(rank, wanted, gridDim.x < kMany ? kDeviations : kDeviationsOfMany);
      if (eights == most || fits(group, rank - half, rank + half, pruned, sampled, tables.capacity)) break;
      taken = eights;
      eights = 2 * eights < most ? 2 * eights : most;
    }

    unsigned counts[kPerThread], sum = 0, total;
#pragma unroll
    for (int b = 0; b < kPerThread; ++b) sum += counts[b] = hist[threadIdx.x * kPerThread + b];
    const unsigned before = pruned + block_scan(sum, total);
    const Key largest = static_cast<Key>(infinity + 1);
    for (int side = 0; side < 2; ++side) {
      const float edge = side == 0 ? rank - half : rank + half;
      if (edge < static_cast<float>(pruned) || edge >= static_cast<float>(sampled)) continue;
      find_crossing(counts, before, static_cast<unsigned>(edge), [&](int b, unsigned sum, unsigned count) {
        // Interpolates as if the keys of a bin were evenly spread, because bins are wider than brackets should be.
        const int bin = static_cast<int>(threadIdx.x) * kPerThread + b;
        const Key lower = bins.lower(bin), upper = bins.upper(bin, largest);
        const bool is_bounded = !is_whole && bin > 0 && bin < kMostBins - 1;
        const unsigned from = static_cast<unsigned>(edge) - sum;
        const auto inner = [&](unsigned k) {
          return static_cast<Key>(lower + static_cast<Key>(static_cast<double>(upper - lower) * k / count));
        };
        edges[side] = side == 0 ? is_bounded ? inner(from) : lower : is_bounded ? inner(from + 1) : upper;
      });
    }
    __syncthreads();
    lo = edges[0];
    hi = edges[1];
    if (rank + half < static_cast<float>(pruned)) hi = bins.upper(0, largest);  // enough is pruned already
  }
  if (threadIdx.x > 0) return;
  group.lo = lo;
  group.hi = hi;
  group.shift = shift_of({lo, hi}, kBins);
  group.mode = kRead;
  group.passes = group.below = group.pruned = group.overflow = group.listed = group.blocks_done = 0;
}

}  // namespace gmp::cuda::kernels
