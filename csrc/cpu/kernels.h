// The loops over every weight, one implementation per instruction set, picked at run time.
#pragma once

#include <array>
#include <cstdint>

#include "layers.h"
#include "search/bracket.h"

namespace gmp::cpu {

// A vector store may write this many bytes past the last key gathered.
inline constexpr int64_t kGatherSlackBytes = 64;

// Loops over the weights [begin, end) of a layer of one dtype; `begin` is at the beginning of a mask byte. Of layers
// with a ranking of their own, `scan` and `apply` take those that are_groups_in_loop (ranked.h).
struct Kernels {
  const char* name;  // of the instruction set
  // Of bits, for every dtype the same.
  int64_t (*count_bits)(const uint8_t* mask, int64_t n);
  // One read. `gathered` (nullptr: count only) receives the keys inside the bracket in order and needs room for them
  // plus the slack; it may be the weights themselves.
  BracketCounts (*scan)(const LayerView& layer, int64_t begin, int64_t end, const Bracket& bracket, void* gathered);
  // Writes the places, less `begin`, of the unpruned weights with this key, in order, for which there must be room;
  // returns how many there are. Takes at most kChunk weights.
  int64_t (*find)(const LayerView& layer, int64_t begin, int64_t end, uint64_t key, uint16_t* places);
  // Zeroes (+0) every weight whose mask bit is 0, whose key is < key, or is equal to it from tie_index on. Writes the
  // new bits of the layer to `kept` (nullptr: not wanted; may be its mask) and returns how many weights are kept. Adds
  // the number of those that the mask kept before to `kept_before`, which costs nothing here: the loop has these bits.
  // Cache lines in which nothing changes are not written.
  int64_t (*apply)(const LayerView& layer, int64_t begin, int64_t end, uint8_t* kept, uint64_t key, int64_t tie_index,
                   int64_t& kept_before);
  // The same for what is ranked of a layer whose weights are elsewhere, and so not written.
  int64_t (*cut)(const LayerView& layer, int64_t begin, int64_t end, uint8_t* kept, uint64_t key, int64_t tie_index,
                 int64_t& kept_before);
  // Writes to `eligible` the bits of all weights that are neither pruned nor protected, given the pattern of the layer,
  // which is kGroups, and whole groups of it. Returns whether an unpruned one is NaN or Inf.
  bool (*protect)(const LayerView& layer, uint8_t* eligible);
  // Sums the magnitudes of the blocks [begin, end) of a layer whose pattern is kBlocks, each in row-major order, and
  // writes the bit of the first weight of each, if there is a mask.
  void (*score)(const LayerView& layer, int64_t begin, int64_t end, void* sums, uint8_t* bits);
  // Moves the kept elements of n to the front of dst, which has room for kGatherSlackBytes more; returns how many.
  int64_t (*pack)(const void* src, const uint8_t* mask, int64_t n, void* dst);
  // The inverse: spreads elements out to the kept places; pruned places get zero. src must be readable for
  // kGatherSlackBytes more.
  void (*unpack)(const void* src, const uint8_t* mask, int64_t n, void* dst);
  // An optimizer step, by Rule.
  void (*update[kNumRules])(const UpdateTensor& tensor, int64_t begin, int64_t end, const UpdateConstants<double>& c);
  // Sum of the squares of the kept weights; these are gradients.
  double (*sum_squares)(const LayerView& layer, int64_t begin, int64_t end);
};

// By DType; filled by one translation unit each.
using KernelSet = std::array<Kernels, kNumDTypes>;

extern const KernelSet kPortableKernels;
#if defined(__x86_64__)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
extern const KernelSet kAvx512Vbmi2Kernels;
#elif defined(__aarch64__)
extern const KernelSet kNeonKernels;
#endif

// The set in use: the widest this CPU runs, or the one that GMP_KERNELS_ISA names. Throws
// std::invalid_argument when that one is unknown or cannot run here.
const KernelSet& active_kernels();

inline const Kernels& kernels_of(DType dtype) { return active_kernels()[static_cast<size_t>(dtype)]; }

}  // namespace gmp::cpu
