// Counts layers against the caller's brackets, for selections of which no single call sees all weights.
#pragma once

#include "counter.cuh"

namespace gmp::cuda::kernels {

template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders)
    count_layers(CountRow* rows, int64_t num_rows, int64_t num_chunks, Key infinity) {
  __shared__ Counts<Key> shared;
  Counter<Key> counter(shared, kListCapacity, infinity);
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    CountRow& row = rows[r];
    counter.aim(row.lo, row.hi, row.shift, false);
    const auto keep = [&](Key key) {
      const unsigned long long place = atomicAdd(counter_at(&row.inside), 1ull);
      if (place < static_cast<unsigned long long>(row.capacity)) store1(pointer<Key>(row.candidates) + place, key);
    };
    const int64_t begin = (first - row.first_chunk) * kChunk;
    count_chunks(row.weights, row.mask, 0, row.n, begin, last - first, counter, keep, [&](int c) {
      counter.report_nonfinite(&row.nonfinite, begin + c * kChunk);
      counter.end_chunk([&](unsigned, Key key) { keep(key); });
    });
    counter.add_sums(row);
    counter.move_bins(pointer<unsigned long long>(row.bins), row.num_bins);
    __syncthreads();
  });
}

}  // namespace gmp::cuda::kernels
