// Kernels on optimizer state and gradients, other than the step itself.
#pragma once

#include "formats.cuh"

namespace gmp::cuda::kernels {

// Moves state, one value per kept weight, from one layout to another.
template <typename Bits>
__device__ void move_chunk(const TensorRow& source, const TensorRow& target, int64_t begin, int64_t end) {
  const uint8_t* const masks[2] = {pointer<const uint8_t>(source.mask), pointer<const uint8_t>(target.mask)};
  const uint64_t offsets[2] = {source.chunk_offsets, target.chunk_offsets};
  int64_t before[2] = {};
  for (int side = 0; side < 2; ++side) {
    if (masks[side] != nullptr) before[side] = pointer<const int64_t>(offsets[side])[begin / kChunk];
  }
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int64_t i = tile + threadIdx.x * kEach;
    const int size = count_from(i, source.n);
    unsigned bits[2];
    int64_t place[2];
    for (int side = 0; side < 2; ++side) {
      bits[side] = load_bits(masks[side], i, size);
      place[side] = i;
      if (masks[side] == nullptr) continue;
      int total;
      place[side] = before[side] + block_scan(__popc(bits[side]), total);
      before[side] += total;
    }
    int read = 0, written = 0;
    for (int j = 0; j < size; ++j) {
      Bits value{};
      if (bits[0] >> j & 1) {
        value = pointer<const Bits>(source.state[0])[place[0] + read];
        ++read;
      }
      if (bits[1] >> j & 1) {
        pointer<Bits>(target.state[0])[place[1] + written] = value;
        ++written;
      }
    }
  }
}

// The targets' rows lie behind those of the sources.
__global__ void __maxnreg__(48) move_state(const TensorRow* sources, int64_t num_rows, int64_t num_chunks) {
  for_each_chunk(sources, num_rows, num_chunks, [&](int64_t r, int64_t, int64_t begin, int64_t end) {
    const TensorRow &source = sources[r], &target = sources[num_rows + r];
    switch (static_cast<DType>(source.dtype)) {
#define GMP_DTYPE(name, key, infinity)           \
  case DType::name:                              \
    move_chunk<key>(source, target, begin, end); \
    break;
      GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
    }
  });
}

// Counts the kept weights of each chunk; a warp takes a chunk, and a lane 64 bytes of its mask.
__global__ void __launch_bounds__(kThreads)
    count_kept(const TensorRow* rows, int64_t num_rows, int64_t num_chunks, int64_t* counts) {
  constexpr int64_t kBytes = kChunk / 8 / kWarpSize;
  static_assert(kBytes % sizeof(uint4) == 0);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t chunk = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; chunk < num_chunks; chunk += stride) {
    const TensorRow& row = rows[row_of(rows, num_rows, chunk)];
    const uint8_t* const mask = pointer<const uint8_t>(row.mask);
    const int64_t begin = (chunk - row.first_chunk) * kChunk;
    const int64_t first = begin + threadIdx.x % kWarpSize * (kBytes * 8);
    int kept = 0;
    if (row.n - begin >= kChunk && is_aligned(mask)) {
#pragma unroll
      for (unsigned v = 0; v < kBytes / sizeof(uint4); ++v) kept += count_bits(mask + first / 8, v);
    } else {
      const int64_t end = first + kBytes * 8 < row.n ? first + kBytes * 8 : row.n;
      for (int64_t i = first; i < end; i += kEach) kept += __popc(load_bits(mask, i, count_from(i, row.n)));
    }
    kept = warp_sum(kept);
    if (threadIdx.x % kWarpSize == 0) counts[chunk] = kept;
  }
}

template <DType kDType>
__device__ double sum_squares_of(const TensorRow& row, int64_t begin, int64_t end) {
  using Bits = Stored<kDType>;
  double sum = 0;
  for (int64_t i = begin + threadIdx.x * kEach; i < end; i += kTile) {
    const int size = count_from(i, row.n);
    const unsigned bits = load_bits(pointer<const uint8_t>(row.mask), i, size);
    if (bits == 0) continue;
    Bits raw[kEach];
    load8(pointer<const Bits>(row.grads) + i, size, raw);
    for (int j = 0; j < kEach; ++j) {
      const double g = static_cast<double>(widened<kDType>(raw[j]));
      if (bits >> j & 1) sum += g * g;
    }
  }
  return sum;
}

// Sums of the chunks.
__global__ void __launch_bounds__(kThreads)
    sum_squares(const TensorRow* rows, int64_t num_rows, int64_t num_chunks, double* sums) {
  for_each_chunk(rows, num_rows, num_chunks, [&](int64_t r, int64_t chunk, int64_t begin, int64_t end) {
    double sum = 0;
    switch (static_cast<DType>(rows[r].dtype)) {
#define GMP_DTYPE(name, key, infinity)                      \
  case DType::name:                                         \
    sum = sum_squares_of<DType::name>(rows[r], begin, end); \
    break;
      GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[chunk] = sum;
  });
}

}  // namespace gmp::cuda::kernels
