// What host and device hand each other: rows of eight-byte fields, which Python fills and reads as int64 tensors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gmp::cuda {

inline constexpr int64_t kChunk = 16384;       // weights that a block takes at a time; a multiple of 8 * kThreads
inline constexpr int64_t kListCapacity = 512;  // candidates kept per chunk: 1/32 of it
inline constexpr int64_t kBins = 2048;

// A layer in a selection or an application. Chunks of all layers are numbered through.
struct LayerRow {
  uint64_t weights, mask, out;  // addresses; mask: 0 if nothing is pruned yet; out: where the new bits go, 0: nowhere
  int64_t n, first_chunk, group;
  uint64_t key;               // apply: the threshold; weights of smaller keys go,
  int64_t cut;                // and of those that tie the ones from this index on. Selection's answer.
  int64_t nonfinite;          // selection's answer: first unpruned NaN or Inf, INT64_MAX if there is none
  int64_t kept_before, kept;  // what apply counted
};

enum Mode : int64_t {
  kStream,  // first read: count against the bracket, keep the keys inside it in lists
  kList,    // the bracket holds: only the lists are read
  kFull,    // it does not, or the lists overflowed: all weights are read again
  kDone,
};

// Layers that share one threshold.
struct GroupRow {
  int64_t first_layer, num_layers, n, num_prune, first_chunk, num_chunks;
  uint64_t lo, hi;
  int64_t shift;  // of a key less lo, which gives its bin
  int64_t mode, passes;
  int64_t below, pruned;  // unpruned keys below lo; mask bits that are 0
  int64_t overflow;       // a chunk had more keys in the bracket than its list holds
  int64_t listed;         // the lists hold every key that ties with the threshold
  int64_t blocks_done;
  uint64_t key;
  int64_t num_below, num_ties, num_ties_kept;
};

// A parameter in an optimizer step.
struct UpdateRow {
  uint64_t weights, grads, master, state[3], mask, ranks;
  int64_t n, first_chunk, constants;
};

// Optimizer state on its way from one layout to another (see cpu/optim.h).
struct RepackRow {
  uint64_t from, from_mask, from_ranks, to, to_mask, to_ranks;
  int64_t n, first_chunk, value_bytes;
};

struct GradRow {
  int64_t dtype;
  uint64_t grads, mask;
  int64_t n, first_chunk;
};

}  // namespace gmp::cuda
