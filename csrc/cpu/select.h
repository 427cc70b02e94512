// Exact selection of magnitude thresholds for many layers at once.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "order/dtypes.h"

namespace gmp::cpu {

struct LayerView {
  void* weights;        // any alignment
  int64_t n;            // > 0
  const uint8_t* mask;  // packed bits, or nullptr: nothing pruned yet
};

struct Threshold {
  double value = 0.0;
  int64_t num_below = 0, num_ties = 0, num_ties_kept = 0;
};

struct Selection {
  Threshold threshold;
  std::vector<int64_t> cuts;       // per layer of the group: ties at index >= cut are pruned
  std::vector<int64_t> nonfinite;  // per layer of the group: first unpruned NaN or Inf, or -1
};

// num_prune has one entry per layer (each is its own group) or a single one (all layers are one group); hints has as
// many entries. Reads only.
std::vector<Selection> select(DType dtype, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune,
                              const std::vector<std::optional<Threshold>>& hints, int num_threads);

}  // namespace gmp::cpu
