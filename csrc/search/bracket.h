// The proof behind every exact selection, for the host and for a GPU: only counts say whether a bracket of keys holds
// the wanted one, and which bracket comes next. Counts add up, so they may come from many threads, ranks or reads.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GMP_HOST_DEVICE __host__ __device__
#else
#define GMP_HOST_DEVICE
#endif

namespace gmp {

// An interval of keys, both ends included; empty if lo > hi.
struct Bracket {
  uint64_t lo, hi;
};

// Counts of unpruned weights relative to a bracket, and of mask bits that are 0; and whether a weight is NaN or Inf.
struct BracketCounts {
  int64_t below = 0, inside = 0, pruned = 0;
  bool nonfinite = false;
};

// Smallest shift that maps the keys of a bracket into so many bins: a key is counted in bin (key - lo) >> shift.
GMP_HOST_DEVICE inline int shift_of(const Bracket& bracket, int64_t num_bins) {
  int shift = 0;
  while (bracket.lo < bracket.hi && (bracket.hi - bracket.lo) >> shift >= static_cast<uint64_t>(num_bins)) ++shift;
  return shift;
}

enum class Proof {
  kNothingWanted,  // enough is pruned already
  kTooHigh,        // the wanted key lies below the bracket
  kTooLow,         // above it
  kHolds,
};

// `wanted` is the rank, from 1, among the unpruned keys.
GMP_HOST_DEVICE inline Proof prove(int64_t wanted, int64_t below, int64_t inside) {
  if (wanted <= 0) return Proof::kNothingWanted;
  if (wanted <= below) return Proof::kTooHigh;
  return wanted > below + inside ? Proof::kTooLow : Proof::kHolds;
}

// All keys on the side of the bracket where the wanted one must be.
GMP_HOST_DEVICE inline Bracket beside(const Bracket& bracket, Proof proof, uint64_t largest_key) {
  return proof == Proof::kTooHigh ? Bracket{0, bracket.lo - 1} : Bracket{bracket.hi + 1, largest_key};
}

// The keys of one bin.
GMP_HOST_DEVICE inline Bracket bin_of(const Bracket& bracket, uint64_t bin, int shift) {
  const uint64_t lo = bracket.lo + (bin << shift), hi = lo + ((uint64_t{1} << shift) - 1);
  return {lo, hi < bracket.hi ? hi : bracket.hi};
}

}  // namespace gmp
