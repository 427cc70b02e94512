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

// Called before the first launch of a call. The runtime linked into this module has a current device of its own. Errors
// stay until they are read, so earlier ones are read first, to tell them from those of this call.
inline void prepare(const Launch& launch) {
#if defined(__CUDACC__)
  check("before this call");
  check("cudaSetDevice", cudaSetDevice(launch.device));
#else
  static_cast<void>(launch);
#endif
}

#if defined(__CUDACC__)
// Makes a call that loads modules, in a mode that allows it while this thread captures a graph.
template <typename Call>
void call_while_capturing(const char* what, Call call) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const cudaError_t error = call();
  cudaThreadExchangeStreamCaptureMode(&mode);
  check(what, error);
}
#endif

// Loads a kernel. Otherwise its first launch would, which is too late while a graph is captured.
template <typename Kernel>
void load([[maybe_unused]] Kernel kernel) {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  call_while_capturing("cudaFuncGetAttributes",
                       [&] { return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)); });
#endif
}

// Rows at an address of the device's memory.
template <typename Row>
Row* rows_at(uint64_t address) {
  return reinterpret_cast<Row*>(address);
}

// Blocks per multiprocessor for kernels whose warps work alone and whose threads need few registers.
inline constexpr unsigned kBlocksOfWarps = 6;

// Number of blocks for so many chunks; at most as many as the device holds at once.
inline unsigned grid_of(const Launch& launch, unsigned per_multiprocessor, int64_t num_chunks) {
  const unsigned most = launch.multiprocessors * per_multiprocessor;
  return num_chunks < most ? static_cast<unsigned>(num_chunks) : most;
}

}  // namespace gmp::cuda
