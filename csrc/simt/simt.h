// A small host execution layer for the CUDA kernels: the same sources, compiled by g++ and run block by block, so that
// they are tested, under sanitizers too, where there is no GPU.
//
// Every thread of a block is a fiber on one stack each; a barrier or a warp operation hands over to another fiber until
// all have come. Blocks run in any order, on as many host threads as there are, and each to its end before its thread
// takes the next: a kernel that waits for another block would hang here, as it may on a GPU. With a seed the order of
// blocks and fibers is shuffled, and fibers stop in between, which lets a missing barrier show.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
// One host thread runs one block at a time. What a block finds in it is whatever the last one left, as on a GPU.
#define __shared__ static thread_local
#define __restrict__ __restrict

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
// Of the fiber that runs now. Not thread_local, which has every use ask whether they are there yet.
extern __thread uint4 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

inline constexpr int kWarp = 32;

// Runs body() for every thread of every block. Throws std::runtime_error if a block cannot go on.
void launch(const char* kernel, unsigned grid, unsigned block, const std::function<void()>& body);

// 0: blocks and fibers in order; else shuffled by it.
void set_seed(uint64_t seed);

// Kernel, launches, bytes loaded and bytes stored since the last call, through load and store of device.cuh: whole
// sectors of 32 bytes, one that a block meets again in a launch only once.
std::vector<std::tuple<std::string, int64_t, int64_t, int64_t>> take_traffic();
void count_load(const void* address, int64_t bytes);
void count_store(const void* address, int64_t bytes);

void barrier();
// Every lane's value, once all lanes of the warp have brought theirs.
const uint64_t* exchange(uint64_t value);
// Where another thread could come in between.
void interruption();

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp() { simt::exchange(0); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Warp operations are called by whole warps only.
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return simt::unpack<T>(simt::exchange(simt::pack(value))[lane & (simt::kWarp - 1)]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::unpack<T>(simt::exchange(simt::pack(value))[(threadIdx.x & (simt::kWarp - 1)) ^ mask]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = threadIdx.x & (simt::kWarp - 1);
  const uint64_t* const values = simt::exchange(simt::pack(value));
  return simt::unpack<T>(values[lane < delta ? lane : lane - delta]);
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint64_t* const values = simt::exchange(predicate);
  unsigned lanes = 0;
  for (int lane = 0; lane < simt::kWarp; ++lane) lanes |= static_cast<unsigned>(values[lane]) << lane;
  return lanes;
}

template <typename T>
T atomicAdd(T* p, T value) {
  simt::interruption();
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicOr(T* p, T value) {
  simt::interruption();
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMin(T* p, T value) {
  simt::interruption();
  T found = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < found && !__atomic_compare_exchange_n(p, &found, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return found;
}
// Past the caches of this multiprocessor: what other blocks wrote.
template <typename T>
T __ldcg(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
