// Everything but the optimizer step.
#include "apply.cuh"
#include "count_layers.cuh"
#include "launch.h"
#include "state.cuh"
#include "ties.cuh"

namespace gmp::cuda {
namespace {

template <typename Key>
void select_typed(const Launch& launch, Key infinity, const Tables& t) {
  // A bracket that fails leaves all bits of a key to be told apart, 9 in each read.
  constexpr int kBits = 9, kPasses = 1 + (static_cast<int>(sizeof(Key)) * 8 - 1 + kBits - 1) / kBits;
  static_assert(int64_t{1} << kBits == kBins);
  const unsigned grid = grid_of(launch, kReaders, t.num_chunks);
  for (int pass = 0; pass < kPasses; ++pass) {
    GMP_LAUNCH(kernels::count<Key>, grid, launch, t.layers, t.groups, t.num_groups, t.num_chunks, t.space, infinity);
  }
  GMP_LAUNCH(kernels::ties<Key>, grid, launch, t.layers, t.groups, t.num_groups, t.num_chunks, t.space, infinity);
}

}  // namespace

unsigned num_counting_blocks(unsigned multiprocessors) { return multiprocessors * kReaders; }

void begin(const Launch& launch, DType dtype, const Tables& t) {
  prepare(launch);
  with_dtype(dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    GMP_LAUNCH(kernels::begin<Key>, static_cast<unsigned>(t.num_groups), launch, t.layers, t.groups, t.num_chunks,
               int64_t{grid_of(launch, kReaders, t.num_chunks)}, t.space, infinity);
  });
}

void select(const Launch& launch, DType dtype, const Tables& tables) {
  prepare(launch);
  with_dtype(dtype, [&](auto infinity) { select_typed(launch, infinity, tables); });
}

void apply(const Launch& launch, DType dtype, const Tables& t, const uint64_t* out, const int64_t* stop) {
  prepare(launch);
  with_dtype(dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    GMP_LAUNCH(kernels::apply<Key>, grid_of(launch, kReaders, t.num_chunks), launch, t.layers, t.num_layers,
               t.num_chunks, t.groups, out, stop, infinity);
  });
}

void count(const Launch& launch, DType dtype, CountRow* rows, int64_t num_rows, int64_t num_chunks) {
  prepare(launch);
  with_dtype(dtype, [&](auto infinity) {
    using Key = decltype(infinity);
    GMP_LAUNCH(kernels::count_layers<Key>, grid_of(launch, kReaders, num_chunks), launch, rows, num_rows, num_chunks,
               infinity);
  });
}

void move_state(const Launch& launch, const StateMoveRow* rows, int64_t num_rows, int64_t num_chunks) {
  prepare(launch);
  GMP_LAUNCH(kernels::move_state, grid_of(launch, kReaders, num_chunks), launch, rows, num_rows, num_chunks);
}

void chunk_offsets(const Launch& launch, const OffsetsRow* rows, int64_t num_rows, int64_t num_chunks,
                   int64_t* totals) {
  prepare(launch);
  const int64_t blocks = (num_chunks + kWarps - 1) / kWarps;
  GMP_LAUNCH(kernels::count_kept, grid_of(launch, kBlocksOfWarps, blocks), launch, rows, num_rows, num_chunks);
  GMP_LAUNCH(kernels::scan_kept, static_cast<unsigned>(num_rows), launch, rows, totals);
}

void sum_squares(const Launch& launch, const GradRow* rows, int64_t num_rows, int64_t num_chunks, double* sums) {
  prepare(launch);
  GMP_LAUNCH(kernels::sum_squares, grid_of(launch, kReaders, num_chunks), launch, rows, num_rows, num_chunks, sums);
  GMP_LAUNCH(kernels::total, 1u, launch, sums, num_chunks);
}

void load_kernels(const Launch& launch) {
  const WhileLoading loading;
  prepare(launch);
  const auto load_typed = [](auto key) {
    using Key = decltype(key);
    load(kernels::begin<Key>);
    load(kernels::count<Key>);
    load(kernels::ties<Key>);
    load(kernels::apply<Key>);
    load(kernels::count_layers<Key>);
  };
#define GMP_KEY(Key) load_typed(Key{});
  GMP_KEYS(GMP_KEY)
#undef GMP_KEY
  load(kernels::move_state);
  load(kernels::count_kept);
  load(kernels::scan_kept);
  load(kernels::sum_squares);
  load(kernels::total);
  load_steps(launch);
}

unsigned multiprocessors_of([[maybe_unused]] int device) {
#if defined(__CUDACC__)
  int count = 0;
  check("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return static_cast<unsigned>(count);
#else
  return 4;
#endif
}

}  // namespace gmp::cuda
