// Flat indices in layers whose memory is not in row-major order (see order/memory_order.h). The other kernels know only
// the order of memory. One of these follows a selection, the other an application; a block of threads takes a layer.
#pragma once

#include "ties.cuh"

namespace gmp::cuda::kernels {

template <typename Visit>
__device__ __forceinline__ void for_each_permuted(const Tables& tables, Visit visit) {
  LayerRow* const rows = pointer<LayerRow>(tables.layers);
  for (int64_t l = blockIdx.x; l < tables.num_layers; l += gridDim.x) {
    if (rows[l].filter.size() > 1) visit(rows[l], pointer<const GroupRow>(tables.groups)[rows[l].group]);
  }
}

// Flat index of the match before which, in row-major order, lie as many matches of its filter as in memory before the
// match at `place`. A match is an unpruned weight whose key is in the bracket.
template <typename Key>
__device__ int64_t flat_index_of(const LayerRow& row, int64_t place, const Bracket& bracket, Key infinity) {
  const int64_t size = row.filter.size(), begin = place / size * size;
  const auto is_match = [&](int64_t at) -> int64_t {
    const Key key = magnitude_key(load1(pointer<const Key>(row.weights) + at), infinity);
    const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), at / kEach * kEach, kEach);
    return bracket.lo <= key && key <= bracket.hi && (bits >> (at % kEach) & 1);
  };
  int64_t before = 0;
  for (int64_t at = begin + threadIdx.x; at < place; at += kThreads) before += is_match(at);
  int64_t rank = block_sum(before);
  const int64_t channels = row.filter.channels, positions = row.filter.positions;
  const int64_t channel = find_crossing_of_all(channels, rank, [&](int64_t c) {
    int64_t matches = 0;
    for (int64_t at = begin + c; at < begin + size; at += channels) matches += is_match(at);
    return matches;
  });
  if (channel < 0) return place;  // the weights have changed meanwhile
  const int64_t position =
      find_crossing_of_all(positions, rank, [&](int64_t p) { return is_match(begin + p * channels + channel); });
  return begin + channel * positions + position;
}

// Turns the places that a selection has found into flat indices. The cut moves to the end of its filter.
template <typename Key>
__global__ void __launch_bounds__(kThreads) to_row_major(Tables tables, Key infinity) {
  for_each_permuted(tables, [&](LayerRow& row, const GroupRow& group) {
    int64_t cut = row.cut, tie_index = cut, nonfinite = row.nonfinite;
    if (0 < cut && cut < row.n) {
      tie_index = flat_index_of(row, cut, {group.key, group.key}, infinity);
      cut = row.filter.end_of(cut + 1);
    }
    if (nonfinite < row.n) {
      nonfinite = flat_index_of(row, nonfinite, {infinity, static_cast<uint64_t>(infinity) + 1}, infinity);
    }
    __syncthreads();  // all threads have read the row
    if (threadIdx.x != 0) return;
    row.cut = cut;
    row.tie_index = tie_index;
    row.nonfinite = nonfinite;
  });
}

// Prunes the ties from the tie index to the cut, which an application has kept.
template <typename Key>
__global__ void __launch_bounds__(kThreads) prune_to_cut(Tables tables, Key infinity) {
  if (tables.finite && *pointer<const int64_t>(tables.nonfinite) != 0) return;
  const uint64_t* const out = pointer<const uint64_t>(tables.out);
  for_each_permuted(tables, [&](LayerRow& row, const GroupRow& group) {
    if (row.tie_index >= row.cut) return;
    const int64_t begin = row.cut - row.filter.size();
    Key* const weights = pointer<Key>(row.weights);
    uint8_t* const mask = pointer<uint8_t>(out[&row - pointer<LayerRow>(tables.layers)]);
    int64_t pruned = 0;
    for (int64_t i = begin / kEach * kEach + threadIdx.x * kEach; i < row.cut; i += kTile) {
      const unsigned before = load_bits(mask, i, count_from(i, row.n));
      unsigned bits = before;
      for (int j = 0; j < kEach; ++j) {
        const int64_t place = i + j;
        if (place < begin || place >= row.cut || !(bits >> j & 1)) continue;
        const bool ties = magnitude_key(load1(weights + place), infinity) == static_cast<Key>(group.key);
        if (!ties || begin + row.filter.in_row_major(place - begin) < row.tie_index) continue;
        store1(weights + place, Key{0});
        bits &= ~(1u << j);
      }
      if (bits != before) store_bits(mask, i, bits);
      pruned += __popc(before ^ bits);
    }
    pruned = block_sum(pruned);
    if (threadIdx.x == 0) row.kept -= pruned;
  });
}

}  // namespace gmp::cuda::kernels
