// Rows of eight-byte fields that host and device exchange. Python fills and reads them as numpy arrays, whose dtypes
// are made in bindings.cpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "optim/rules.h"
#include "order/memory_order.h"
#include "order/pattern.h"

namespace gmp::cuda {

inline constexpr int64_t kChunk = 16384;       // weights that a block takes at a time; a multiple of 8 * kThreads
inline constexpr int64_t kListCapacity = 768;  // most candidates kept per chunk: 4.7 % of it
inline constexpr int64_t kBins = 512;
// Blocks that a multiprocessor holds at once, for the kernels that read weights; it gives the size of the grids.
inline constexpr unsigned kReaders = 3;
inline constexpr int64_t kTouchedBy = 256;  // weights whose flags are one word (see LayerRow), a bit for each eight

// A layer in a selection or an application. Chunks are numbered across all layers.
struct LayerRow {
  uint64_t weights, mask;  // addresses; mask: 0 if nothing is pruned yet
  int64_t n, first_chunk, group;
  int64_t cut;                // selection's answer: ties from this index on are pruned
  int64_t nonfinite;          // selection's answer: first unpruned NaN or Inf, INT64_MAX if there is none
  Filter filter;              // if it is larger than one weight (see filters.cuh), apply prunes ties from the end of a
  int64_t tie_index;          // filter on, and afterwards those before from this row-major index on are pruned
  int64_t kept_before, kept;  // counts of apply
  int64_t touched;  // place in the buffer of a bit per eight weights: has apply to read them (see count_strip)? 0: all
};

enum Mode : int64_t {
  kRead,  // all weights are read: counted against the bracket, the keys inside it kept in lists where they fit
  kList,  // only the lists are read
  kDone,
};

enum Listed : int64_t {
  kNotListed,
  kKeys,    // they hold all of them
  kCounts,  // they hold how many there are, among the counts of all keys from lo on
};

// Layers that share one threshold.
struct GroupRow {
  int64_t first_layer, num_layers, n, num_prune, first_chunk, num_chunks;
  uint64_t lo, hi;  // the bracket; given with hi > 0, it replaces the one from a sample
  int64_t shift;    // of a key less lo, which gives its bin
  int64_t mode, passes;
  int64_t below, pruned;  // unpruned keys below lo; mask bits that are 0
  int64_t overflow;       // a chunk had more keys in the bracket than its list holds
  int64_t listed;         // a Listed: what the lists know of the keys that tie with the threshold
  int64_t blocks_done;
  uint64_t key;
  int64_t num_below, num_ties, num_ties_kept;
};

// The layers of one dtype in a selection or an application, their groups, and the places of results that one kernel
// leaves for the next. All of it lies in one buffer, by its addresses there.
struct Tables {
  uint64_t buffer;
  uint64_t layers, groups;           // rows
  uint64_t bins;                     // uint64_t, kBins per group, or per block that counts if those are fewer
  uint64_t lists;                    // keys, or counts of keys, `capacity` per chunk
  uint64_t list_counts, tie_counts;  // uint32_t, one per chunk
  uint64_t nonfinite;                // int64_t, set once there is an unpruned NaN or Inf in any layer
  int64_t num_layers, num_groups, num_chunks, capacity;
  int64_t dtype;     // a DType
  int64_t permuted;  // whether the memory of some layer is not in row-major order
  // For an application: the addresses of the new bits, one per layer, or 0; and whether a NaN or Inf stops it.
  uint64_t out;
  int64_t finite;
};

// A layer that is counted against the caller's bracket (see BracketCounts in backends/types.py).
struct CountRow {
  uint64_t weights, mask;
  int64_t n, first_chunk;
  uint64_t lo, hi;
  int64_t shift;
  uint64_t candidates;  // address; receives the keys inside
  int64_t capacity;     // in keys
  uint64_t bins;        // int64_t
  int64_t num_bins;
  int64_t below, inside, pruned, nonfinite;  // the answer
};

// A layer with a pattern or with scores (see patterns.cuh).
struct PatternRow {
  uint64_t source, mask;  // what ranks it: scores or the weights themselves; 0 bits are pruned
  uint64_t ranked;        // bits of what is neither pruned nor protected, weights or blocks; 0: those of the mask
  uint64_t sums;          // of the magnitudes of blocks
  uint64_t weights, out;  // written: zeros, unless it is 0, and new bits
  int64_t n, first_chunk;
  Pattern pattern;
  Filter filter;
  uint64_t nonfinite;     // address of an int64_t: set if an unpruned weight is NaN or Inf, and then nothing is written
  uint64_t layer, group;  // rows of the selection with the cutoff; if they are 0, it is here:
  uint64_t key;           // what is ranked goes if its key is below this one, or is the same and its row-major index
  int64_t tie_index;      // is not before this one
  int64_t kept_before, kept;  // the answer
};

// A tensor in an optimizer step; or only its gradient, its mask, or an array of its state, with all other fields 0.
struct TensorRow {
  uint64_t weights, grads, master, state[kMaxStates], mask;
  uint64_t chunk_offsets;  // of compact state: kept weights before each chunk, and their total
  int64_t n, first_chunk;
  int64_t constants;  // which row of them
  int64_t dtype;      // a DType: of the weights, or of what there is instead
};

// Constants that are an argument of the launch: nothing has to be uploaded for them.
using ArgumentConstants = std::array<UpdateConstants<double>, 8>;

}  // namespace gmp::cuda
