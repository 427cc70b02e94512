// Exact selection of magnitude thresholds for many layers at once, and the counts for selections that are made
// elsewhere.
#pragma once

#include <algorithm>
#include <vector>

#include "chunks.h"
#include "search/bracket.h"

namespace gmp::cpu {

// Layers [first_layer, first_layer + num_layers), all of one dtype, that are ranked together, and the state of the
// search for their threshold.
struct Group {
  size_t first_layer, num_layers;
  int64_t num_prune;
  // Holds the expected threshold; empty if a sample is to give one. In the end it holds only the threshold, or is
  // {0, 0} if nothing more has to be pruned.
  Bracket bracket;
  // Counts of one read, relative to the bracket.
  BracketCounts counts = {};
  int64_t* bins = nullptr;         // adds the keys inside up by bin; nullptr: not wanted
  void* candidates = nullptr;      // receives them, in the order of each chunk, as far as they fit
  int64_t capacity = 0;            // of the candidates, in keys
  uint16_t* chunk_bins = nullptr;  // zeros that receive the bins of each chunk; nullptr: not wanted
  size_t first_chunk = 0;
  // Set before the read.
  int64_t n = 0;                // weights
  int64_t expected_inside = 0;  // candidates that there should be
};

// Number of weights that stay among those whose key is the threshold.
inline int64_t num_ties_kept(const Group& group) {
  return std::min(group.counts.inside,
                  group.counts.pruned + group.counts.below + group.counts.inside - group.num_prune);
}

// Finds the cutoff of each group: its threshold, the counts relative to it and, per layer, the row-major index from
// which on ties are pruned; also that of the first unpruned NaN or Inf of each layer, or -1. Reads only.
void select(const std::vector<LayerView>& layers, std::vector<Group>& groups, std::vector<int64_t>& tie_indices,
            std::vector<int64_t>& nonfinite, int num_threads);

// The counter: one read of the layers of some groups, each against the bracket of its group. Sets their counts, adds to
// their bins, and lowers nonfinite[l], unless it is -1, to the place in memory of the first unpruned NaN or Inf of a
// layer. Returns the chunks, with the places of their candidates; those of a group are next to each other, in the order
// of memory.
std::vector<Chunk> count(const std::vector<LayerView>& layers, const std::vector<Group*>& groups, int64_t num_bins,
                         std::vector<int64_t>& nonfinite, int num_threads);

}  // namespace gmp::cpu
