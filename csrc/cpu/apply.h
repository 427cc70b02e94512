// Writing what a selection decided, and enforcing masks.
#pragma once

#include <cstdint>
#include <vector>

#include "chunks.h"
#include "kernels.h"
#include "layers.h"
#include "order/dtypes.h"

namespace gmp::cpu {

// One pass over layers of a dtype: zeroes the pruned weights, writes the bits of the kept ones to kept[i] (which may be
// layers[i].mask; an empty `kept`: not wanted), and counts. Pruned are the keys below keys[i], and of those equal to it
// the ones from index tie_indices[i] on; without keys, the masks are enforced and no more.
//
// The constructor allocates all that run() needs. So passes that belong together are made first and run then: once one
// has written, none can fail. `layers` has to outlive the pass.
class ApplyPass {
 public:
  ApplyPass(DType dtype, const std::vector<LayerView>& layers, std::vector<uint64_t> keys,
            std::vector<int64_t> tie_indices, std::vector<uint8_t*> kept);

  void run(int num_threads) noexcept;

  const std::vector<ApplyCounts>& counts() const { return counts_; }  // one per layer

 private:
  template <typename Key>
  void run_typed(Key infinity, int num_threads) noexcept;

  DType dtype_;
  const std::vector<LayerView>& layers_;
  std::vector<uint64_t> keys_;
  std::vector<int64_t> tie_indices_;
  std::vector<uint8_t*> kept_;
  ChunkTable chunks_;
  std::vector<ApplyCounts> counts_;
};

}  // namespace gmp::cpu
