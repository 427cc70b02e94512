// One launch, on a GPU or on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"
#include "launchers.h"

#if defined(__CUDACC__)
#define GMP_LAUNCH(kernel, grid, on, ...)                                                      \
  do {                                                                                         \
    kernel<<<(grid), kThreads, 0, reinterpret_cast<cudaStream_t>((on).stream)>>>(__VA_ARGS__); \
    check(#kernel);                                                                            \
  } while (0)
#else
#define GMP_LAUNCH(kernel, grid, on, ...)                                  \
  do {                                                                     \
    static_cast<void>(on);                                                 \
    simt::launch(#kernel, (grid), kThreads, [&] { kernel(__VA_ARGS__); }); \
  } while (0)
#endif

namespace gmp::cuda {

#if defined(__CUDACC__)
inline void check(const char* what, cudaError_t error = cudaGetLastError()) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
#endif

// What comes before the first launch of a call. The runtime linked into this module has a current device of its own;
// and errors stay until somebody asks: whose they are shows only if nobody's are left.
inline void prepare(const Launch& launch) {
#if defined(__CUDACC__)
  check("before this call");
  check("cudaSetDevice", cudaSetDevice(launch.device));
#else
  static_cast<void>(launch);
#endif
}

// Blocks to a multiprocessor where every warp works alone and threads need few registers.
inline constexpr unsigned kBlocksOfWarps = 6;

// Blocks for so many chunks: as many as the device holds at once, at most.
inline unsigned grid_of(const Launch& launch, unsigned per_multiprocessor, int64_t num_chunks) {
  const unsigned most = launch.multiprocessors * per_multiprocessor;
  return num_chunks < most ? static_cast<unsigned>(num_chunks) : most;
}

}  // namespace gmp::cuda
