// All operations except the optimizer step and those of patterns.
#include <algorithm>
#include <cstring>

#include "apply.cuh"
#include "count_layers.cuh"
#include "filters.cuh"
#include "launch.h"
#include "state.cuh"

namespace gmp::cuda {

// Words that one launch takes as an argument: enough for most calls, and the most possible. More than 4 KB need a
// driver that only toolkits from 13.0 on require.
inline constexpr int64_t kFewWords = 480;
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
inline constexpr int64_t kManyWords = 4080;
#else
inline constexpr int64_t kManyWords = kFewWords;
#endif

namespace kernels {

template <int64_t kWords>
__global__ void __launch_bounds__(kThreads)
    store(const __grid_constant__ std::array<uint64_t, kWords> given, int64_t count, uint64_t* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = given[i];
}

}  // namespace kernels

namespace {

template <int64_t kWords>
void store_words(const Launch& launch, const uint64_t* from, int64_t count, uint64_t* to) {
  std::array<uint64_t, kWords> given;  // what lies behind `count` is never looked at
  std::memcpy(given.data(), from, static_cast<size_t>(count) * sizeof(uint64_t));
  const auto grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  GMP_LAUNCH(kernels::store<kWords>, grid, launch, given, count, to);
}

// For kernels in which a block takes a layer.
unsigned layers_grid(const Launch& launch, const Tables& tables) {
  return grid_of(launch, kReaders, tables.num_layers);
}

}  // namespace

void select(const Launch& launch, const Tables& tables) {
  prepare(launch);
  const unsigned grid = grid_of(launch, kReaders, tables.num_chunks);
  with_dtype(static_cast<DType>(tables.dtype), [&](auto infinity) {
    using Key = decltype(infinity);
    // After a bracket that fails, all bits of a key are still to be found, 9 in each read.
    constexpr int kBits = 9, kPasses = 1 + (static_cast<int>(sizeof(Key)) * 8 - 1 + kBits - 1) / kBits;
    static_assert(int64_t{1} << kBits == kBins);
    const auto num_groups = static_cast<unsigned>(tables.num_groups);
    GMP_LAUNCH(kernels::begin<Key>, num_groups, launch, tables, int64_t{grid}, infinity);
    for (int pass = 0; pass < kPasses; ++pass) GMP_LAUNCH(kernels::count<Key>, grid, launch, tables, infinity);
    GMP_LAUNCH(kernels::ties<Key>, grid, launch, tables, infinity);
    if (tables.permuted) GMP_LAUNCH(kernels::to_row_major<Key>, layers_grid(launch, tables), launch, tables, infinity);
  });
}

void apply(const Launch& launch, const Tables& tables) {
  prepare(launch);
  with_dtype(static_cast<DType>(tables.dtype), [&](auto infinity) {
    using Key = decltype(infinity);
    GMP_LAUNCH(kernels::apply<Key>, grid_of(launch, kReaders, tables.num_chunks), launch, tables, infinity);
    if (tables.permuted && tables.out != 0) {
      GMP_LAUNCH(kernels::prune_to_cut<Key>, layers_grid(launch, tables), launch, tables, infinity);
    }
  });
}

void count(const Launch& launch, int64_t dtype, uint64_t rows, int64_t num_rows, int64_t num_chunks) {
  prepare(launch);
  with_dtype(static_cast<DType>(dtype), [&](auto infinity) {
    using Key = decltype(infinity);
    GMP_LAUNCH(kernels::count_layers<Key>, grid_of(launch, kReaders, num_chunks), launch, rows_at<CountRow>(rows),
               num_rows, num_chunks, infinity);
  });
}

void move_state(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks) {
  prepare(launch);
  GMP_LAUNCH(kernels::move_state, grid_of(launch, kReaders, num_chunks), launch, rows_at<const TensorRow>(rows),
             num_rows, num_chunks);
}

void count_kept(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t counts) {
  prepare(launch);
  const int64_t blocks = (num_chunks + kWarps - 1) / kWarps;
  GMP_LAUNCH(kernels::count_kept, grid_of(launch, kBlocksOfWarps, blocks), launch, rows_at<const TensorRow>(rows),
             num_rows, num_chunks, rows_at<int64_t>(counts));
}

void sum_squares(const Launch& launch, uint64_t rows, int64_t num_rows, int64_t num_chunks, uint64_t sums) {
  prepare(launch);
  GMP_LAUNCH(kernels::sum_squares, grid_of(launch, kReaders, num_chunks), launch, rows_at<const TensorRow>(rows),
             num_rows, num_chunks, rows_at<double>(sums));
}

int64_t most_stored() { return 4 * kManyWords; }

void store(const Launch& launch, const uint64_t* from, int64_t count, uint64_t address) {
  prepare(launch);
  for (uint64_t* to = rows_at<uint64_t>(address); count > 0; from += kManyWords, to += kManyWords) {
    if (count <= kFewWords) {
      store_words<kFewWords>(launch, from, count, to);
    } else {
      store_words<kManyWords>(launch, from, std::min(count, kManyWords), to);
    }
    count -= kManyWords;
  }
}

void fetch(const Launch& launch, uint64_t address, size_t bytes, void* to) {
  prepare(launch);
  const void* const from = rows_at<const void>(address);
#if defined(__CUDACC__)
  const auto stream = reinterpret_cast<cudaStream_t>(launch.stream);
  check("copy to the host", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  check("copy to the host", cudaStreamSynchronize(stream));
#else
  std::memcpy(to, from, bytes);
#endif
}

unsigned load_kernels([[maybe_unused]] int device) {
  int multiprocessors = 4;  // of the host, for the tests
#if defined(__CUDACC__)
  call_while_capturing("cudaSetDevice", [&] { return cudaSetDevice(device); });
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
#endif
  const auto load_typed = [](auto key) {
    using Key = decltype(key);
    load(kernels::begin<Key>);
    load(kernels::count<Key>);
    load(kernels::ties<Key>);
    load(kernels::to_row_major<Key>);
    load(kernels::apply<Key>);
    load(kernels::prune_to_cut<Key>);
    load(kernels::count_layers<Key>);
  };
#define GMP_KEY(Key) load_typed(Key{});
  GMP_KEYS(GMP_KEY)
#undef GMP_KEY
  load(kernels::move_state);
  load(kernels::count_kept);
  load(kernels::sum_squares);
  load(kernels::store<kFewWords>);
  load(kernels::store<kManyWords>);
  load_steps();
  load_patterns();
  return static_cast<unsigned>(multiprocessors);
}

}  // namespace gmp::cuda
