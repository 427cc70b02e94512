// The two loops that touch every weight, one implementation per instruction set, picked at run time.
#pragma once

#include <cstdint>

#include "update.h"

namespace gmp::cpu {

template <typename Key>
struct ScanCounts {
  int64_t below = 0;   // unpruned keys < lo
  int64_t inside = 0;  // unpruned keys in [lo, hi]
  int64_t pruned = 0;  // mask bits that are 0
  Key largest = 0;     // largest unpruned key; >= infinity tells of NaN or Inf
};

struct ApplyCounts {
  int64_t kept_before = 0;
  int64_t kept = 0;
};

// A vector store may write this many bytes past the last key gathered.
inline constexpr int64_t kGatherSlackBytes = 64;

template <typename Key>
struct Kernels {
  // One read of n weights. `mask` (nullptr: nothing pruned) starts at the bit of weights[0], on a byte boundary.
  // `gathered` (nullptr: count only) receives the keys inside [lo, hi] in order and needs room for n of them plus the
  // slack; it may be `weights` itself. Alignment of `weights` does not matter.
  ScanCounts<Key> (*scan)(const Key* weights, int64_t n, const uint8_t* mask, Key infinity, Key lo, Key hi,
                          Key* gathered);
  // Zeroes (+0) every weight whose mask bit is 0 or whose key is < limit, and writes the new bits to `kept` (nullptr:
  // not wanted; may be `mask`). Cache lines in which nothing changes are not written.
  ApplyCounts (*apply)(Key* weights, int64_t n, const uint8_t* mask, uint8_t* kept, Key infinity, Key limit);
  // Moves the kept elements of n to the front of dst, which has room for kGatherSlackBytes more; returns how many.
  int64_t (*pack)(const Key* src, const uint8_t* mask, int64_t n, Key* dst);
  // Spreads them out again; pruned places get zero. src must be readable for kGatherSlackBytes more.
  void (*unpack)(const Key* src, const uint8_t* mask, int64_t n, Key* dst);
};

// The optimizer's loops for one storage format of weights.
struct UpdateKernels {
  int64_t weight_bytes, state_bytes;
  void (*update[kNumRules])(const UpdateTensor&, const UpdateConstants<double>&);  // by Rule
  double (*sum_squares)(const UpdateTensor&);                                      // of the kept gradients
};

// Filled by one translation unit each.
struct KernelSet {
  const char* name;
  int64_t (*count_bits)(const uint8_t* mask, int64_t n);
#define GMP_KEY(Key) Kernels<Key> of_##Key;
  GMP_KEYS(GMP_KEY)
#undef GMP_KEY
  UpdateKernels update_kernels[kNumDTypes];  // by DType
};

extern const KernelSet kPortableKernels;
#if defined(__x86_64__)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
#endif

// The set in use: the widest this CPU runs, or the one GMP_KERNELS_ISA (portable, avx2, avx512) asks for. Throws
// std::invalid_argument when that one is unknown or cannot run here.
const KernelSet& active_kernels();

template <typename Key>
const Kernels<Key>& kernels_for() {
  const KernelSet& set = active_kernels();
#define GMP_KEY(Type) \
  if constexpr (std::is_same_v<Key, Type>) return set.of_##Type;
  GMP_KEYS(GMP_KEY)
#undef GMP_KEY
}

}  // namespace gmp::cpu
