#include <cstring>

#include "launch.h"
#include "transfers.h"

namespace gmp::cuda {

// Words that one launch takes as an argument: those of most calls, and as many as there can be. More than 4 KB need a
// driver that only toolkits from 13.0 on insist on.
inline constexpr int64_t kFewWords = 480;
#if defined(CUDART_VERSION) && CUDART_VERSION >= 13000
inline constexpr int64_t kManyWords = 4080;
#else
inline constexpr int64_t kManyWords = kFewWords;
#endif

namespace kernels {

template <int64_t kWords>
struct Words {
  uint64_t words[kWords];
};

template <int64_t kWords>
__global__ void __launch_bounds__(kThreads)
    store(const __grid_constant__ Words<kWords> given, int64_t count, uint64_t* to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = given.words[i];
}

}  // namespace kernels

namespace {

template <int64_t kWords>
void store_words(const Launch& launch, const uint64_t* from, int64_t count, uint64_t* to) {
  kernels::Words<kWords> given;  // what lies behind `count` is never looked at
  std::memcpy(given.words, from, static_cast<size_t>(count) * sizeof(uint64_t));
  const auto grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  GMP_LAUNCH(kernels::store<kWords>, grid, launch, given, count, to);
}

}  // namespace

int64_t most_stored() { return 4 * kManyWords; }

void store(const Launch& launch, const uint64_t* from, int64_t count, uint64_t* to) {
  prepare(launch);
  for (; count > 0; from += kManyWords, to += kManyWords, count -= kManyWords) {
    if (count <= kFewWords) {
      store_words<kFewWords>(launch, from, count, to);
    } else {
      store_words<kManyWords>(launch, from, count < kManyWords ? count : kManyWords, to);
    }
  }
}

void fetch(const Launch& launch, const void* from, size_t bytes, void* to) {
  prepare(launch);
#if defined(__CUDACC__)
  const auto stream = reinterpret_cast<cudaStream_t>(launch.stream);
  check("copy to the host", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream));
  check("copy to the host", cudaStreamSynchronize(stream));
#else
  std::memcpy(to, from, bytes);
#endif
}

void load_transfers([[maybe_unused]] const Launch& launch) {
  const WhileLoading loading;
  prepare(launch);
  load(kernels::store<kFewWords>);
  load(kernels::store<kManyWords>);
}

}  // namespace gmp::cuda
