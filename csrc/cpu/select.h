// Exact selection of magnitude thresholds for many layers at once, and the counts that selections elsewhere are made
// of.
#pragma once

#include <optional>
#include <vector>

#include "layers.h"
#include "search/bracket.h"

namespace gmp::cpu {

// Layers [first_layer, first_layer + num_layers) that are ranked together.
struct RankedGroup {
  size_t first_layer, num_layers;
  int64_t num_prune;
  std::optional<Bracket> bracket;  // where the threshold is expected; without one, a sample says
};

// Where each layer is cut: weights of smaller keys are pruned, and of those whose key it is the ones from the tie index
// on. One entry per layer; key and counts are those of its group.
struct Cutoffs {
  std::vector<uint64_t> keys;  // 0 where nothing more is to be pruned
  std::vector<int64_t> num_below, num_ties, num_ties_kept, tie_indices;
  std::vector<int64_t> nonfinite;  // first unpruned NaN or Inf, or -1
};

// Reads only.
Cutoffs select(DType dtype, const std::vector<LayerView>& layers, const std::vector<RankedGroup>& groups,
               int num_threads);

// Receives keys inside a bracket, in no particular order; capacity 0: none.
struct Candidates {
  void* keys;
  int64_t capacity;
};

struct LayerCounts {
  BracketCounts counts;    // more inside than there is room for candidates: not all of them are there
  int64_t nonfinite = -1;  // index of the first unpruned NaN or Inf
};

// One bracket, candidates and a row of `bins` per layer. Adds to `bins`. Reads every weight once.
std::vector<LayerCounts> count(DType dtype, const std::vector<LayerView>& layers, const std::vector<Bracket>& brackets,
                               const std::vector<Candidates>& candidates, int64_t* bins, int64_t num_bins,
                               int num_threads);

}  // namespace gmp::cpu
