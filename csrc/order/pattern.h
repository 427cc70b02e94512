// Patterns: which weights of a layer are pruned beside each other, and which only together. The kinds, and the three
// numbers of each, are those that gmp_kernels/patterns.py passes.
#pragma once

#include <cstdint>

#include "memory_order.h"

// Other compilers than nvcc do not know the pragma.
#if defined(__CUDACC__)
#define GMP_UNROLL _Pragma("unroll")
#else
#define GMP_UNROLL
#endif

namespace gmp {

enum PatternKind : int64_t {
  kNoPattern,  // any weight may be pruned
  kGroups,     // of each group the last in the order are kept
  kBlocks,     // the weights of a block are pruned together
};

struct Pattern {
  int64_t kind = kNoPattern, a = 0, b = 0, c = 0;

  // Groups: memory is [outer][of * any][stride], and `of` weights that lie `stride` apart are one, of which `keep`
  // stay.
  constexpr int64_t keep() const { return a; }
  constexpr int64_t of() const { return b; }
  constexpr int64_t stride() const { return c; }
  // Blocks, of the matrix whose rows have `width` weights.
  constexpr int64_t rows() const { return a; }
  constexpr int64_t cols() const { return b; }
  constexpr int64_t width() const { return c; }
  constexpr int64_t across() const { return c / b; }  // blocks of a band of `rows` rows

  // Whether a group is a whole filter, in which memory has an order of its own (see memory_order.h).
  constexpr bool is_permuted(const Filter& filter) const {
    return filter.positions > 1 && stride() == 1 && of() == filter.size();
  }
  // Whether groups lie whole in eight consecutive weights, in the order of memory: then nothing else has to be read.
  constexpr bool is_within_eight(const Filter& filter) const {
    return kind == kGroups && stride() == 1 && (of() == 2 || of() == 4 || of() == 8) && !is_permuted(filter);
  }
};

// The standing of a weight among others: pruned weights come before every key.
template <typename Key>
__attribute__((always_inline)) constexpr Key standing_of(Key key, bool is_kept) {
  return is_kept ? static_cast<Key>(key + 1) : Key{0};
}

// Bits of those of `kSize` weights in a row, groups of `kOf` side by side, that are neither pruned (their bit is 0) nor
// among the `keep` last of their group. Of equal weights the first is the last in the order.
template <int kOf, int kSize, typename Key>
__attribute__((always_inline)) constexpr unsigned eligible_in(const Key (&keys)[kSize], unsigned bits, int keep) {
  Key standings[kSize] = {};
  int after[kSize] = {};  // how many of its group come after each
  GMP_UNROLL
  for (int i = 0; i < kSize; ++i) standings[i] = standing_of(keys[i], (bits >> i & 1) != 0);
  GMP_UNROLL
  for (int i = 0; i < kSize; ++i) {
    GMP_UNROLL
    for (int j = i + 1; j < i / kOf * kOf + kOf; ++j) {
      const bool is_after = standings[j] > standings[i];
      after[i] += is_after;
      after[j] += !is_after;
    }
  }
  unsigned eligible = 0;
  GMP_UNROLL
  for (int i = 0; i < kSize; ++i) eligible |= static_cast<unsigned>(after[i] >= keep) << i;
  return eligible & bits;
}

}  // namespace gmp
