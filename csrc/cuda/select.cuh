// Exact selection for all layers in a fixed number of launches: begin, count (some times), ties.
//
//   begin  a sample of each group's keys gives the bracket [lo, hi], unless the caller did
//   count  the first one reads every weight once: it counts the keys below the bracket, makes a histogram of those
//          inside, and lists these in a short list per chunk (for 16-bit keys in a narrow bracket, it lists how often
//          each occurs). The last block of a group checks the proof, below < wanted <= below + inside, and narrows the
//          bracket to the bin with the wanted key. Further ones read the lists, or all weights again if the proof
//          failed or a list overflowed, or nothing if all is done.
//   ties   finds the index from which on tied weights are pruned
//
// Nothing here depends on the order in which blocks run: all sums are of integers, lists are used as sets.
// Source: Floyd and Rivest, CACM 18(3), 1975, as streamed by GPU top-k selections; histograms as in radix selection.
#pragma once

#include "sample.cuh"

namespace gmp::cuda::kernels {

// Returns a bin to which other blocks have added, and empties it.
__device__ inline unsigned long long take_bin(unsigned long long* bin) {
  const unsigned long long count = __ldcg(bin);
  *bin = 0;
  return count;
}

// Proves the bracket of a group by its counts, and narrows it. take(bin) returns a count and sets it to zero.
template <typename Key, typename Take>
__device__ void narrow(LayerRow* rows, GroupRow& group, bool counts_each, Key infinity, Take take) {
  constexpr int kPerThread = kBins / kThreads;
  __shared__ bool finished;
  const Bracket bracket{group.lo, group.hi};
  const int shift = static_cast<int>(group.shift);
  const int64_t below = __ldcg(&group.below), pruned = __ldcg(&group.pruned);
  const bool listed = group.mode == kList || __ldcg(&group.overflow) == 0;
  const int64_t wanted = group.num_prune - pruned;
  unsigned long long counts[kPerThread], sum = 0, inside;
#pragma unroll
  for (int b = 0; b < kPerThread; ++b) sum += counts[b] = take(threadIdx.x * kPerThread + b);
  const unsigned long long before = block_scan(sum, inside);  // and all have read what is written from here on
  const Proof proof = prove(wanted, below, static_cast<int64_t>(inside));
  if (threadIdx.x == 0) finished = proof == Proof::kNothingWanted;  // and nobody looks at that of an earlier call
  __syncthreads();
  const auto aim = [&](const Bracket& next, int64_t below_next, int64_t mode) {
    group.lo = next.lo;
    group.hi = next.hi;
    group.below = below_next;
    group.shift = shift_of(next, kBins);
    group.mode = mode;
  };
  if (proof == Proof::kNothingWanted) {
    if (threadIdx.x == 0) {
      group.key = 0;
      group.num_below = pruned;
      group.num_ties = group.num_ties_kept = 0;
    }
  } else if (proof != Proof::kHolds) {
    if (threadIdx.x == 0) {
      aim(beside(bracket, proof, static_cast<uint64_t>(infinity) + 1),
          proof == Proof::kTooHigh ? 0 : below + static_cast<int64_t>(inside), kRead);
    }
  } else {
    const auto rank = static_cast<unsigned long long>(wanted - below - 1);
    find_crossing(counts, before, rank, [&](int b, unsigned long long sum, unsigned long long count) {
      const int64_t lower = below + static_cast<int64_t>(sum);
      const Bracket bin = bin_of(bracket, uint64_t{threadIdx.x} * kPerThread + b, shift);
      if (shift == 0) {
        group.key = bin.lo;
        group.num_below = pruned + lower;
        group.num_ties = count;
        group.num_ties_kept = group.num_below + group.num_ties - group.num_prune;
        group.listed = !listed ? kNotListed : counts_each ? kCounts : kKeys;
        finished = true;
      } else {
        aim(bin, lower, listed ? kList : kRead);
      }
    });
  }
  __syncthreads();
  if (finished && wanted > 0) {
    for (int64_t l = threadIdx.x; l < group.num_layers; l += kThreads) rows[l].cut = 0;
  }
  if (threadIdx.x == 0) {
    if (finished) group.mode = kDone;
    ++group.passes;
    group.overflow = group.blocks_done = 0;
  }
}

// Ends a chunk that has been read; `number` is the number of the chunk.
template <typename Key>
__device__ __forceinline__ void end_chunk(Counter<Key>& counter, LayerRow& layer, int64_t begin, GroupRow& group,
                                          const Tables& tables, int number) {
  Key* const list = pointer<Key>(tables.lists) + number * tables.capacity;
  if (counter.report_nonfinite(&layer.nonfinite, begin)) *pointer<int64_t>(tables.nonfinite) = 1;
  const unsigned inside = counter.end_chunk([&](unsigned k, Key key) { store1(list + k, key); });
  if (threadIdx.x > 0) return;
  pointer<unsigned>(tables.list_counts)[number] = inside;
  if (inside > tables.capacity) atomicOr(counter_at(&group.overflow), 1ull);
}

// Calls visit(key, l) for all listed keys of the chunks [first, last), and done(chunk, l) after the last key of each. A
// warp takes a run of chunks, and reads 32 of their sizes at once. It loads kLists lists at the same time, numbered l.
inline constexpr int kLists = 4;
template <typename Key, typename Visit, typename Done>
__device__ __forceinline__ void for_each_listed(const Tables& tables, int first, int last, Visit visit, Done done) {
  constexpr int kParts = 4;  // keys of each list that a lane loads at the same time
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = kWarps;
  const int until = first + static_cast<int>(int64_t{warp + 1} * (last - first) / warps);
  for (int base = first + static_cast<int>(int64_t{warp} * (last - first) / warps); base < until; base += kWarpSize) {
    const unsigned sizes = base + lane < until ? pointer<const unsigned>(tables.list_counts)[base + lane] : 0;
    for (int c = 0; c < static_cast<int>(kWarpSize) && base + c < until; c += kLists) {
      const Key* const lists = pointer<const Key>(tables.lists) + (base + c) * tables.capacity;
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
            if (own < size[l]) keys[l][u] = load1(lists + l * tables.capacity + own);
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
__global__ void __launch_bounds__(kThreads, kReaders) count(Tables tables, Key infinity) {
  __shared__ Counts<Key> shared;
  Counter<Key> counter(shared, tables.capacity, infinity);
  GroupRow* const groups = pointer<GroupRow>(tables.groups);
  const Deal deal(tables, gridDim.x);
  deal.for_each_run(groups, tables.num_groups, [&](int g, int first, int last) {
    GroupRow& group = groups[g];
    const int64_t mode = group.mode;
    if (mode == kDone) return;
    counter.aim(group.lo, group.hi, group.shift, mode == kRead);
    LayerRow* const rows = pointer<LayerRow>(tables.layers) + group.first_layer;
    if (mode == kList) {
      for_each_listed<Key>(tables, first, last, [&](Key key, int) { counter.take_listed(key); }, [](int, int) {});
    } else {
      for_each_run(rows, group.num_layers, first, last, [&](int l, int from, int until) {
        LayerRow& layer = rows[l];
        const int64_t begin = (from - layer.first_chunk) * kChunk;
        count_chunks(
            layer.weights, layer.mask, layer.touched == 0 ? 0 : tables.buffer + layer.touched, layer.n, begin,
            until - from, counter, [](Key) {},
            [&](int c) { end_chunk(counter, layer, begin + c * kChunk, group, tables, from + c); });
      });
      if (group.passes == 0) counter.add_sums(group);
    }
    __syncthreads();
    const int64_t num_blocks = deal.num_blocks_of(group, g);
    auto* const bins = bins_of(tables, group, g, deal, gridDim.x);
    if (num_blocks > 1) {
      counter.move_bins(bins, kBins);
      if (!is_last_block(&group.blocks_done, num_blocks)) return;
    }
    narrow(rows, group, counter.counts_each(), infinity,
           [&](int64_t b) -> unsigned long long { return num_blocks > 1 ? take_bin(bins + b) : counter.take_bin(b); });
  });
}

}  // namespace gmp::cuda::kernels
