// A small host execution layer for the CUDA kernels: the same sources, compiled by g++ and run block by block, so that
// they are tested, under sanitizers too, where there is no GPU.
//
// Every thread of a block is a fiber with its own stack. A barrier or a warp operation switches to another fiber until
// all have arrived. Blocks run in any order, on all host threads, and each runs to its end before its host thread takes
// the next: a kernel that waits for another block would hang here, as it may on a GPU. With a seed, the order of blocks
// and fibers is shuffled, and fibers also stop in between, which reveals a missing barrier.
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
// A host thread runs one block at a time. As on a GPU, a block finds the data that the last one left.
#define __shared__ static thread_local
#define __restrict__ __restrict

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};
// Those of the fiber that runs now. Not thread_local, which would check at every use whether they are initialized.
extern __thread uint4 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

inline constexpr int kWarp = 32;

// Runs body() for every thread of every block. Throws std::runtime_error if a block cannot go on.
void launch(const char* kernel, unsigned grid, unsigned block, const std::function<void()>& body);

// 0: blocks and fibers run in order. Otherwise it is the seed by which they are shuffled.
void set_seed(uint64_t seed);

// Per kernel: launches, bytes loaded and bytes stored since the last call, through load and store of device.cuh. Whole
// sectors of 32 bytes count, each once per block and launch.
std::vector<std::tuple<std::string, int64_t, int64_t, int64_t>> take_traffic();
void count_load(const void* address, int64_t bytes);
void count_store(const void* address, int64_t bytes);

void barrier();
// Returns the values of all lanes, once every lane of the warp has brought its own.
const uint64_t* exchange(uint64_t value);
// A point at which another thread may run in between.
void interruption();

// The value of another lane.
template <typename T>
T shuffled(T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits)[lane];
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
  return simt::shuffled(value, lane & (simt::kWarp - 1));
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return simt::shuffled(value, (threadIdx.x & (simt::kWarp - 1)) ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = threadIdx.x & (simt::kWarp - 1);
  return simt::shuffled(value, lane < delta ? lane : lane - delta);
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
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(int64_t bits) { return __builtin_ffsll(bits); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, int shift) { return high << shift | low >> (32 - shift); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fsqrt_rn(float v) { return __builtin_sqrtf(v); }
inline double __dsqrt_rn(double v) { return __builtin_sqrt(v); }
using __half = _Float16;
inline void* __cvta_global_to_generic(uint64_t address) { return reinterpret_cast<void*>(address); }

// Loads past the caches of this multiprocessor, to see what other blocks wrote.
template <typename T>
T __ldcg(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
