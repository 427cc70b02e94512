// Writing what a selection decided, and enforcing masks.
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.h"
#include "kernels.h"
#include "order/dtypes.h"
#include "select.h"

namespace gmp::cpu {

// Where one layer is cut: weights of magnitude < value are pruned, and those of magnitude == value at index >= cut.
struct Cut {
  double value;
  int64_t index;
};

// One pass over layers of a dtype: zeroes the pruned weights, writes the bits of the kept ones to kept[i] (which may be
// layers[i].mask; an empty `kept`: not wanted), and counts. An empty `cuts` only enforces the masks.
//
// The constructor allocates all that run() needs. So passes that belong together are made first and run then: once one
// has written, none can fail. `layers` has to outlive the pass.
class ApplyPass {
 public:
  ApplyPass(DType dtype, const std::vector<LayerView>& layers, const std::vector<Cut>& cuts,
            std::vector<uint8_t*> kept);

  void run(int num_threads) noexcept;

  const std::vector<ApplyCounts>& counts() const { return counts_; }  // one per layer

 private:
  template <typename Key>
  void run_typed(Key infinity, int num_threads) noexcept;

  DType dtype_;
  const std::vector<LayerView>& layers_;
  std::vector<uint64_t> limits_;  // keys below are pruned, and from the cut on this key is
  std::vector<int64_t> cuts_;
  std::vector<uint8_t*> kept_;
  ChunkTable chunks_;
  std::vector<ApplyCounts> counts_;
};

}  // namespace gmp::cpu
