// Launches for layers with patterns or scores.
#include "launch.h"
#include "patterns.cuh"

namespace gmp::cuda {

namespace {

// Calls launch_one(rows, number of rows, number of chunks, dtype) for each part of a table.
template <typename LaunchOne>
void for_each_part(const Launch& launch, uint64_t rows, const std::vector<PatternPart>& parts, LaunchOne launch_one) {
  prepare(launch);
  for (const auto& [kind, dtype, first, num_rows, num_chunks] : parts) {
    launch_one(static_cast<PatternWork>(kind), static_cast<DType>(dtype), rows_at<PatternRow>(rows) + first, num_rows,
               num_chunks);
  }
}

}  // namespace

PatternPlan plan_of(const Pattern& pattern, const Filter& filter) {
  const bool settles_alone = pattern.kind == kNoPattern || pattern.is_within_eight(filter);
  if (pattern.kind == kBlocks) return {kWholeBlocks, pattern.rows() * pattern.cols() * kThreads, false};
  if (pattern.kind == kGroups && pattern.of() > kWarpSize) return {kLongGroups, pattern.of(), false};
  return {kWeights, kChunk, settles_alone};
}

void rank(const Launch& launch, uint64_t table, const std::vector<PatternPart>& parts) {
  for_each_part(launch, table, parts, [&](PatternWork work, DType dtype, auto* rows, int64_t num_rows, int64_t chunks) {
    const auto grid_with = [&](unsigned per_multiprocessor) { return grid_of(launch, per_multiprocessor, chunks); };
    if (work == kWholeBlocks) {
      const unsigned grid = grid_with(kBlocksOfWarps);
#define GMP_DTYPE(name, Key, infinity) \
  if (dtype == DType::name) GMP_LAUNCH(kernels::sum_blocks<DType::name>, grid, launch, rows, num_rows, chunks);
      GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
      return;
    }
    with_dtype(dtype, [&](auto infinity) {
      using Key = decltype(infinity);
      if (work == kLongGroups) {
        const unsigned grid = grid_with(kernels::kFewReaders);
        GMP_LAUNCH(kernels::rank_rows<Key>, grid, launch, rows, num_rows, chunks, infinity);
      } else {
        GMP_LAUNCH(kernels::rank_groups<Key>, grid_with(kReaders), launch, rows, num_rows, chunks, infinity);
      }
    });
  });
}

void settle(const Launch& launch, uint64_t table, const std::vector<PatternPart>& parts) {
  for_each_part(launch, table, parts, [&](PatternWork work, DType dtype, auto* rows, int64_t num_rows, int64_t chunks) {
    with_dtype(dtype, [&](auto infinity) {
      using Key = decltype(infinity);
      if constexpr (sizeof(Key) >= sizeof(float)) {  // as sums are
        if (work == kWholeBlocks) {
          const unsigned grid = grid_of(launch, kBlocksOfWarps, chunks);
          GMP_LAUNCH(kernels::settle_blocks<Key>, grid, launch, rows, num_rows, chunks, infinity);
          return;
        }
      }
      const unsigned grid = grid_of(launch, kernels::kFewReaders, chunks);
      GMP_LAUNCH(kernels::settle<Key>, grid, launch, rows, num_rows, chunks, infinity);
    });
  });
}

void load_patterns() {
#define GMP_DTYPE(name, Key, infinity) load(kernels::sum_blocks<DType::name>);
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  const auto load_typed = [](auto key) {
    using Key = decltype(key);
    load(kernels::rank_groups<Key>);
    load(kernels::rank_rows<Key>);
    load(kernels::settle<Key>);
    if constexpr (sizeof(Key) >= sizeof(float)) load(kernels::settle_blocks<Key>);
  };
#define GMP_KEY(Key) load_typed(Key{});
  GMP_KEYS(GMP_KEY)
#undef GMP_KEY
}

}  // namespace gmp::cuda
