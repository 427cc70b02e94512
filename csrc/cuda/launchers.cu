#include <stdexcept>

#include "apply.cuh"
#include "launchers.h"
#include "select.cuh"
#include "update.cuh"

#if defined(__CUDACC__)
#define GMP_LAUNCH(kernel, grid, launch, ...)                                                      \
  do {                                                                                             \
    kernel<<<(grid), kThreads, 0, reinterpret_cast<cudaStream_t>((launch).stream)>>>(__VA_ARGS__); \
    check(cudaGetLastError(), #kernel);                                                            \
  } while (0)
#else
#define GMP_LAUNCH(kernel, grid, launch, ...)                              \
  do {                                                                     \
    static_cast<void>(launch);                                             \
    simt::launch(#kernel, (grid), kThreads, [&] { kernel(__VA_ARGS__); }); \
  } while (0)
#endif

namespace gmp::cuda {
namespace {

#if defined(__CUDACC__)
void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}
#endif

unsigned grid_of(const Launch& launch, int64_t num_chunks) {
  return num_chunks < launch.num_blocks ? static_cast<unsigned>(num_chunks) : launch.num_blocks;
}

template <typename Key>
void select_typed(const Launch& launch, Key infinity, LayerRow* layers, int64_t num_layers, GroupRow* groups,
                  int64_t num_groups, int64_t num_chunks, const kernels::Workspace<Key>& space) {
  // A bracket that fails leaves all bits of a key to be told apart, 11 in each read.
  constexpr int kPasses = 1 + (static_cast<int>(sizeof(Key)) * 8 - 1 + 10) / 11;
  const unsigned grid = grid_of(launch, num_chunks);
  GMP_LAUNCH(kernels::begin<Key>, static_cast<unsigned>(num_groups), launch, layers, groups, infinity);
  for (int pass = 0; pass < kPasses; ++pass) {
    GMP_LAUNCH(kernels::count<Key>, grid, launch, layers, num_layers, groups, num_chunks, space, infinity);
  }
  GMP_LAUNCH(kernels::ties<Key>, grid, launch, layers, num_layers, groups, num_chunks, space, infinity);
}

}  // namespace

void select(const Launch& launch, DType dtype, LayerRow* layers, int64_t num_layers, GroupRow* groups,
            int64_t num_groups, int64_t num_chunks, void* bins, void* lists, unsigned* list_counts,
            unsigned* tie_counts) {
  switch (dtype) {
#define GMP_DTYPE(name, Key, infinity)                                        \
  case DType::name:                                                           \
    return select_typed<Key>(                                                 \
        launch, infinity, layers, num_layers, groups, num_groups, num_chunks, \
        {static_cast<unsigned long long*>(bins), static_cast<Key*>(lists), list_counts, tie_counts});
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
}

void apply(const Launch& launch, DType dtype, LayerRow* layers, int64_t num_layers, int64_t num_chunks) {
  const unsigned grid = grid_of(launch, num_chunks);
  switch (dtype) {
#define GMP_DTYPE(name, Key, infinity)                                                            \
  case DType::name:                                                                               \
    GMP_LAUNCH(kernels::apply<Key>, grid, launch, layers, num_layers, num_chunks, Key{infinity}); \
    return;
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
}

namespace {

template <Rule kRule>
void update_by(const Launch& launch, DType dtype, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
               const UpdateConstants<double>* constants) {
  const unsigned grid = grid_of(launch, num_chunks);
  switch (dtype) {
    case DType::float32:
      GMP_LAUNCH((kernels::update<kRule, kernels::Wide<float>>), grid, launch, rows, num_rows, num_chunks, constants);
      return;
    case DType::float64:
      GMP_LAUNCH((kernels::update<kRule, kernels::Wide<double>>), grid, launch, rows, num_rows, num_chunks, constants);
      return;
    case DType::float16:
      GMP_LAUNCH((kernels::update<kRule, kernels::Float16>), grid, launch, rows, num_rows, num_chunks, constants);
      return;
    case DType::bfloat16:
      GMP_LAUNCH((kernels::update<kRule, kernels::BFloat16>), grid, launch, rows, num_rows, num_chunks, constants);
      return;
  }
}

}  // namespace

void update(const Launch& launch, DType dtype, Rule rule, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
            const UpdateConstants<double>* constants) {
  switch (rule) {
    case Rule::sgd:
      return update_by<Rule::sgd>(launch, dtype, rows, num_rows, num_chunks, constants);
    case Rule::adam:
      return update_by<Rule::adam>(launch, dtype, rows, num_rows, num_chunks, constants);
    case Rule::average:
      return update_by<Rule::average>(launch, dtype, rows, num_rows, num_chunks, constants);
  }
}

void repack(const Launch& launch, const RepackRow* rows, int64_t num_rows, int64_t num_chunks) {
  GMP_LAUNCH(kernels::repack, grid_of(launch, num_chunks), launch, rows, num_rows, num_chunks);
}

void ranks(const Launch& launch, const uint8_t* mask, int64_t n, int64_t* ranks_out) {
  GMP_LAUNCH(kernels::ranks, 1u, launch, mask, n, ranks_out);
}

void sum_squares(const Launch& launch, const GradRow* rows, int64_t num_rows, int64_t num_chunks, double* sums) {
  GMP_LAUNCH(kernels::sum_squares, grid_of(launch, num_chunks), launch, rows, num_rows, num_chunks, sums);
  GMP_LAUNCH(kernels::total, 1u, launch, sums, num_chunks);
}

DeviceInfo device_info() {
#if defined(__CUDACC__)
  int device = 0;
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return {cudaGetErrorString(error), 0, 0, 0};
  return {"", properties.multiProcessorCount, properties.major, properties.minor};
#else
  return {"", 2, 0, 0};
#endif
}

}  // namespace gmp::cuda
