// Building blocks of the kernels: access to memory in eights, sums and scans over a block, walks over chunks.
//
// A thread takes eight consecutive weights, whose mask bits are one byte. Everything that touches weights goes through
// load8 and store8, which the host execution layer counts.
#pragma once

#include "order/magnitude_key.h"
#include "tables.h"

#if defined(__CUDACC__)
namespace simt {  // which counts on the host only
__device__ inline void count_load(const void*, int64_t) {}
__device__ inline void count_store(const void*, int64_t) {}
}  // namespace simt
#else
#include "../simt/simt.h"
#endif

namespace gmp::cuda {

inline constexpr unsigned kThreads = 256, kWarpSize = 32, kWarps = kThreads / kWarpSize;
inline constexpr int kEach = 8;  // weights per thread and tile
inline constexpr int64_t kTile = kThreads * kEach;
static_assert(kChunk % (4 * kTile) == 0, "whole chunks are read several tiles at a time");

// Addresses from tables are those of global memory, which the compiler has to be told.
template <typename T>
__device__ __forceinline__ T* pointer(uint64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(address));
}

// A field of a row in the type that atomic operations take.
__device__ inline unsigned long long* counter_at(int64_t* field) {
  return reinterpret_cast<unsigned long long*>(field);
}

template <typename T>
__device__ bool is_aligned(const T* p) {
  return (reinterpret_cast<uint64_t>(p) & 15) == 0;
}

// The first `count` of eight values; the others are zero. Views may be unaligned, and tensors may end anywhere. kWhole
// says that neither is the case here, unless count is 0.
template <bool kWhole = false, typename T>
__device__ __forceinline__ void load8(const T* p, int count, T (&values)[kEach]) {
  simt::count_load(p, count * static_cast<int64_t>(sizeof(T)));
  if (kWhole ? count != 0 : count == kEach && is_aligned(p)) {
    constexpr int kVectors = kEach * sizeof(T) / sizeof(uint4);
    uint4 raw[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) raw[v] = reinterpret_cast<const uint4*>(p)[v];
    memcpy(values, raw, sizeof(values));
    return;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    values[j] = T{};
    if (!kWhole && j < count) values[j] = p[j];
  }
}

template <bool kWhole = false, typename T>
__device__ __forceinline__ void store8(T* p, int count, const T (&values)[kEach]) {
  simt::count_store(p, count * static_cast<int64_t>(sizeof(T)));
  if (kWhole || (count == kEach && is_aligned(p))) {
    constexpr int kVectors = kEach * sizeof(T) / sizeof(uint4);
    uint4 raw[kVectors];
    memcpy(raw, values, sizeof(values));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<uint4*>(p)[v] = raw[v];
    return;
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (j < count) p[j] = values[j];
  }
}

template <typename T>
__device__ T load1(const T* p) {
  simt::count_load(p, sizeof(T));
  return *p;
}
template <typename T>
__device__ void store1(T* p, T value) {
  simt::count_store(p, sizeof(T));
  *p = value;
}

// A key, except that NaNs still differ.
template <typename Key>
__device__ __forceinline__ Key magnitude_bits(Key raw) {
  return raw & static_cast<Key>(~kSignBit<Key>);
}

// The mask bits of eight weights, of which `count` exist; a layer without a mask keeps all.
__device__ inline unsigned load_bits(const uint8_t* mask, int64_t i, int count) {
  if (count == 0) return 0;
  unsigned bits = 0xff;
  if (mask != nullptr) {
#if !defined(GMP_WITHOUT_MASK_BYTES)  // benchmarks/cuda_static.py looks for other accesses that are a byte wide
    bits = load1(mask + i / 8);
#endif
  }
  return bits & ((1u << count) - 1);
}

__device__ inline void store_bits(uint8_t* mask, int64_t i, unsigned bits) {
#if !defined(GMP_WITHOUT_MASK_BYTES)
  store1(mask + i / 8, static_cast<uint8_t>(bits));
#endif
}

// The mask bits of the 64 weights from a multiple of eight on, of which `count` exist; none if it is negative.
__device__ __forceinline__ uint64_t load_word(const uint8_t* mask, int64_t i, int count) {
  if (count <= 0) return 0;
  uint64_t word = ~uint64_t{0};
  if (mask != nullptr && count >= 64 && (reinterpret_cast<uint64_t>(mask + i / 8) & 7) == 0) {
    word = load1(reinterpret_cast<const uint64_t*>(mask + i / 8));
  } else if (mask != nullptr) {
    word = 0;
#pragma unroll 1
    for (int j = 0; j < 64 && j < count; j += kEach) {
      word |= static_cast<uint64_t>(load_bits(mask, i + j, count - j < kEach ? count - j : kEach)) << j;
    }
  }
  return count >= 64 ? word : word & ((uint64_t{1} << count) - 1);
}

// The number of bits that are set in the v-th 16 bytes of a mask, from an aligned byte on.
__device__ __forceinline__ int count_bits(const uint8_t* mask, unsigned v) {
  const uint4 words = load1(reinterpret_cast<const uint4*>(mask) + v);
  return __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
}

static_assert(kTouchedBy == kWarpSize * kEach, "the lanes of a warp make a word");

// How many of the eight weights from `i` on exist.
__device__ inline int count_from(int64_t i, int64_t n) {
  const int64_t left = n - i;
  return left >= kEach ? kEach : left > 0 ? static_cast<int>(left) : 0;
}

// The weights and mask bits of eights that are a tile apart, the first of them beginning at index i of `size`; kWhole:
// see load8. Nothing waits for what is loaded before it is used.
template <bool kWhole, int kEights, typename T>
__device__ __forceinline__ void load_eights(const T* weights, const uint8_t* mask, int i, int size,
                                            T (&raw)[kEights][kEach], unsigned (&bits)[kEights]) {
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int own = i + e * static_cast<int>(kTile), there = kWhole ? kEach : count_from(own, size);
    load8<kWhole>(weights + own, there, raw[e]);
    bits[e] = load_bits(mask, own, there);
  }
}

// Calls visit(index, weights, mask bits) for each eight of a chunk that this thread takes; kWhole: see load8.
template <bool kWhole, typename T, typename Visit>
__device__ __forceinline__ void for_each_eight(const T* weights, const uint8_t* mask, int size, Visit visit) {
  constexpr int kEights = kWhole && sizeof(T) < 8 ? 8 / sizeof(T) : 1;  // four loads of 16 bytes at a time
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x) * kEach; first < size; first += kEights * static_cast<int>(kTile)) {
    T raw[kEights][kEach];
    unsigned bits[kEights];
    load_eights<kWhole>(weights, mask, first, size, raw, bits);
#pragma unroll
    for (int e = 0; e < kEights; ++e) visit(first + e * static_cast<int>(kTile), raw[e], bits[e]);
  }
}

// The sum over the warp, for all its lanes.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// The sum over the lanes before this one, and over all.
template <typename T>
__device__ __forceinline__ T warp_scan(T value, T& total) {
  T inclusive = value;
  for (unsigned step = 1; step < kWarpSize; step *= 2) {
    const T lower = __shfl_up_sync(~0u, inclusive, step);
    if (threadIdx.x % kWarpSize >= step) inclusive += lower;
  }
  total = __shfl_sync(~0u, inclusive, static_cast<int>(kWarpSize) - 1);
  return inclusive - value;
}

// All threads of the block have to call the next functions, and all get the result.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  __shared__ T partial[kWarps];
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T total{};
  for (unsigned w = 0; w < kWarps; ++w) total += partial[w];
  __syncthreads();  // `partial` is used again
  return total;
}

// Sum of the values of the threads before this one.
template <typename T>
__device__ __forceinline__ T block_scan(T value, T& total) {
  __shared__ T sums[kWarps];
  const unsigned warp = threadIdx.x / kWarpSize;
  T before = warp_scan(value, total);
  if (threadIdx.x % kWarpSize == 0) sums[warp] = total;
  __syncthreads();
  total = T{};
  for (unsigned w = 0; w < kWarps; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  __syncthreads();
  return before;
}

// Blocks take contiguous runs of chunks, so that most of them meet one layer only. Block b begins at b * chunks /
// blocks.
__device__ inline int64_t first_chunk_of(int64_t block, int64_t num_chunks) { return block * num_chunks / gridDim.x; }

// The one of kCount counts in a row where the running sum first exceeds `rank`, if it does among these: visit(its
// position, the sum before it, the count).
template <typename Count, int kCount, typename Visit>
__device__ __forceinline__ void find_crossing(const Count (&counts)[kCount], Count before, Count rank, Visit visit) {
  int found = -1;
  Count sum = 0, count = 0;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (before <= rank && rank < before + counts[c]) {
      found = c;
      sum = before;
      count = counts[c];
    }
    before += counts[c];
  }
  if (found >= 0) visit(found, sum, count);
}

// The row that a chunk belongs to: the last one that begins at or before it. Rows are never empty. With padding, a
// place is looked up instead of a chunk. Each row but the first then has `padding` more places before those of its
// chunks.
template <typename Row>
__device__ int64_t row_of(const Row* rows, int64_t num_rows, int64_t chunk, int64_t padding = 0) {
  int64_t low = 0, high = num_rows - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (rows[middle].first_chunk + padding * (middle - 1) <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Weights of the chunk that begins at `begin`.
__device__ inline int size_of_chunk(int64_t n, int64_t begin) {
  return static_cast<int>(n - begin < kChunk ? n - begin : kChunk);
}

// Calls visit(row number, first chunk, last chunk) for the part of [first, last) in each row from `row` on. The last
// chunk is not included, and each row's beginning takes `padding` from it. Rows and chunks are numbered in 32 bits,
// because registers are scarce: 2^31 chunks are 2^45 weights.
template <typename Row, typename Visit>
__device__ __forceinline__ void for_each_run_from(const Row* rows, int64_t num_rows, int row, int first, int last,
                                                  int padding, Visit visit) {
  for (; first < last; ++row, last -= padding) {
    const int next = row + 1 < num_rows ? static_cast<int>(rows[row + 1].first_chunk) : last;
    const int until = next < last ? next : last;
    visit(row, first, until);
    first = until;
  }
}

template <typename Row, typename Visit>
__device__ __forceinline__ void for_each_run(const Row* rows, int64_t num_rows, int first, int last, Visit visit) {
  for_each_run_from(rows, num_rows, static_cast<int>(row_of(rows, num_rows, first)), first, last, 0, visit);
}

// The same for the chunks of this block.
template <typename Row, typename Visit>
__device__ __forceinline__ void for_each_run(const Row* rows, int64_t num_rows, int64_t num_chunks, Visit visit) {
  for_each_run(rows, num_rows, static_cast<int>(first_chunk_of(blockIdx.x, num_chunks)),
               static_cast<int>(first_chunk_of(blockIdx.x + 1, num_chunks)), visit);
}

// Calls visit(row number, chunk, begin, end) for each chunk of this block; it is [begin, end) of its row.
template <typename Row, typename Visit>
__device__ __forceinline__ void for_each_chunk(const Row* rows, int64_t num_rows, int64_t num_chunks, Visit visit) {
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    for (int chunk = first; chunk < last; ++chunk) {
      const int64_t begin = (chunk - rows[r].first_chunk) * kChunk;
      visit(r, chunk, begin, begin + size_of_chunk(rows[r].n, begin));
    }
  });
}

// Whether this block is the last of `expected` to arrive; if so, it sees the writes of the others.
__device__ __forceinline__ bool is_last_block(int64_t* arrived, int64_t expected) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();  // every thread's writes come before the ticket
  if (threadIdx.x == 0) {
    const auto ticket = atomicAdd(counter_at(arrived), 1ull);
    last = static_cast<int64_t>(ticket) == expected - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;  // written again only after the next barrier
}

}  // namespace gmp::cuda
