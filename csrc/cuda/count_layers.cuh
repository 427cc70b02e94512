// Counts layers against brackets of the caller's, for selections that no single call sees whole.
#pragma once

#include "counter.cuh"

namespace gmp::cuda::kernels {

template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders)
    count_layers(CountRow* rows, int64_t num_rows, int64_t num_chunks, Key infinity) {
  __shared__ Counts<Key> shared;
  Counter<Key> counter(shared, kListCapacity, infinity);
  int64_t current = -1;

  const auto leave = [&] {
    if (current < 0) return;
    CountRow& row = rows[current];
    const auto below = block_sum(static_cast<unsigned long long>(counter.below));
    const auto pruned = block_sum(static_cast<unsigned long long>(counter.pruned));
    if (threadIdx.x == 0) {
      atomicAdd(counter_at(&row.below), below);
      atomicAdd(counter_at(&row.pruned), pruned);
    }
    counter.move_bins(pointer<unsigned long long>(row.bins), row.num_bins);
    __syncthreads();
  };

  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t, int64_t begin, int64_t) {
    CountRow& row = rows[r];
    if (r != current) {
      leave();
      current = r;
      counter.aim(row.lo, row.hi, row.shift, false);
    }
    const auto keep = [&](Key key) {
      const unsigned long long place = atomicAdd(counter_at(&row.inside), 1ull);
      if (place < static_cast<unsigned long long>(row.capacity)) store1(pointer<Key>(row.candidates) + place, key);
    };
    count_chunks(row.weights, row.mask, 0, row.n, begin, 1, counter, keep, [&](int) {
      counter.report_nonfinite(&row.nonfinite, begin);
      counter.end_chunk([&](unsigned, Key key) { keep(key); });
    });
  });
  leave();
}

}  // namespace gmp::cuda::kernels
