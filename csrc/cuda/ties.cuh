// Finds, among the weights that tie with a threshold, the one from which on they are pruned.
#pragma once

#include "select.cuh"

namespace gmp::cuda::kernels {

// Returns the position where a running sum of counts first exceeds `rank`, and subtracts the sum before it from the
// rank; -1 if the whole sum does not exceed it. The whole block must call it.
template <typename CountAt>
__device__ int64_t find_crossing_of_all(int64_t size, int64_t& rank, CountAt count_at) {
  __shared__ int64_t crossing, left;
  constexpr int kCounts = 8;  // per thread at a time
  if (threadIdx.x == 0) crossing = -1;
  __syncthreads();
  for (int64_t first = 0; crossing < 0 && first < size; first += kCounts * kThreads) {
    const int64_t own = first + threadIdx.x * kCounts;
    int64_t counts[kCounts], sum = 0, total;
#pragma unroll
    for (int c = 0; c < kCounts; ++c) sum += counts[c] = own + c < size ? count_at(own + c) : 0;
    const int64_t before = block_scan(sum, total);
    find_crossing(counts, before, rank, [&](int c, int64_t sum_before, int64_t) {
      crossing = own + c;
      left = rank - sum_before;
    });
    rank -= total;
    __syncthreads();
  }
  const int64_t found = crossing;
  if (found >= 0) rank = left;
  __syncthreads();  // both are used again
  return found;
}

// Bits of the (at most) 64 weights from `begin` on that tie.
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

// Done by the last block of a group: finds the block, the chunk and the weight from which on ties are pruned.
template <typename Key>
__device__ void place_cut(LayerRow* rows, const GroupRow& group, int64_t g, const Deal& deal,
                          const unsigned* block_ties, const unsigned* tie_counts, Key infinity) {
  static_assert(kChunk == 64 * kThreads);
  int64_t rank = group.num_ties_kept;
  const int64_t first_block = deal.block_of(group.first_chunk, g);
  const auto first_of = [&](int64_t block) { return deal.first_chunk_of(first_block + block, group, g); };
  const int64_t block = find_crossing_of_all(deal.num_blocks_of(group, g), rank,
                                             [&](int64_t b) { return int64_t{__ldcg(&block_ties[first_of(b)])}; });
  if (block < 0) return;  // the weights have changed meanwhile
  const int64_t first = first_of(block);
  const int64_t until = first_of(block + 1), end = group.first_chunk + group.num_chunks;
  const int64_t found = find_crossing_of_all((until < end ? until : end) - first, rank,
                                             [&](int64_t c) { return int64_t{__ldcg(&tie_counts[first + c])}; });
  if (found < 0) return;
  const int64_t chunk = first + found;
  const int64_t l = row_of(rows, group.num_layers, chunk);
  const LayerRow& row = rows[l];
  const int64_t begin = (chunk - row.first_chunk) * kChunk + threadIdx.x * 64;
  uint64_t ties = ties_of(row, begin, static_cast<Key>(group.key), infinity);
  int64_t total;
  const int64_t before = block_scan(static_cast<int64_t>(__popcll(ties)), total);
  if (before <= rank && rank < before + __popcll(ties)) {
    for (int64_t skip = rank - before; skip > 0; --skip) ties &= ties - 1;
    rows[l].cut = begin + (__ffsll(ties) - 1);
  }
  for (int64_t other = threadIdx.x; other < group.num_layers; other += kThreads) {
    if (other < l) rows[other].cut = rows[other].n;
  }
}

// How many weights of the chunk that begins at `begin` tie; a whole warp calls it.
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
__global__ void __launch_bounds__(kThreads, kReaders) ties(Tables tables, Key infinity) {
  unsigned* const tie_counts = pointer<unsigned>(tables.tie_counts);
  GroupRow* const groups = pointer<GroupRow>(tables.groups);
  const Deal deal(tables, gridDim.x);
  deal.for_each_run(groups, tables.num_groups, [&](int g, int first, int last) {
    GroupRow& group = groups[g];
    if (group.num_ties_kept == 0) return;
    LayerRow* const rows = pointer<LayerRow>(tables.layers) + group.first_layer;
    const Key threshold = static_cast<Key>(group.key);
    unsigned sum = 0;  // no GPU has memory for more weights per block
    const auto leave = [&](int chunk, unsigned matches) {
      matches = warp_sum(matches);
      if (threadIdx.x % kWarpSize != 0) return;
      tie_counts[chunk] = matches;
      sum += matches;
    };
    if (group.listed == kCounts) {
      const Key* const counts = pointer<const Key>(tables.lists) + (group.key - group.lo);
      for (int chunk = first + static_cast<int>(threadIdx.x); chunk < last; chunk += kThreads) {
        tie_counts[chunk] = load1(counts + chunk * tables.capacity);
        sum += tie_counts[chunk];
      }
    } else if (group.listed == kKeys) {
      unsigned matches[kLists] = {};
      for_each_listed<Key>(
          tables, first, last, [&](Key key, int l) { matches[l] += key == threshold; },
          [&](int chunk, int l) {
            leave(chunk, matches[l]);
            matches[l] = 0;
          });
    } else {
      for (int chunk = first + static_cast<int>(threadIdx.x / kWarpSize); chunk < last; chunk += kWarps) {
        const LayerRow& layer = rows[row_of(rows, group.num_layers, chunk)];
        leave(chunk, ties_in(layer, (chunk - layer.first_chunk) * kChunk, threshold, infinity));
      }
    }
    // The lists have been read, so the size of this block's first one is replaced by its result.
    sum = block_sum(sum);
    unsigned* const block_ties = pointer<unsigned>(tables.list_counts);
    if (threadIdx.x == 0) block_ties[first] = sum;
    if (is_last_block(&group.blocks_done, deal.num_blocks_of(group, g))) {
      place_cut<Key>(rows, group, g, deal, block_ties, tie_counts, infinity);
    }
    __syncthreads();
  });
}

}  // namespace gmp::cuda::kernels
