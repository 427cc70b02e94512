// Selection as a by-product: whoever writes the weights has each chunk counted while it is still in the cache, so that
// a prune update right after an optimizer step finds its thresholds ready.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "dtypes.h"
#include "select.h"

namespace gmp::cpu {

class Tally {
 public:
  virtual ~Tally() = default;

  // Counts one chunk (of chunks.h) of a layer, which does not change any more. Threads may call it at the same time,
  // each from inside a parallel region of at most `num_threads`; every chunk is counted once.
  virtual void count(size_t layer, int64_t begin, int64_t end) = 0;

  // Once all chunks have been counted: as select() would answer, or nothing for a group whose bracket did not hold or
  // whose candidates were too many.
  virtual std::vector<std::optional<Selection>> take_selections() = 0;
};

// Reads a sample of the weights as they are before they are written; arguments as for select(). Memory: 1 to 3 % of the
// layers that are being counted at the same time.
std::unique_ptr<Tally> begin_tally(DType dtype, const std::vector<LayerView>& layers,
                                   const std::vector<int64_t>& num_prune, int num_threads);

// A hash of about a thousand weights per layer: equal as long as nothing has been done to the layer as a whole.
std::vector<uint64_t> fingerprints(DType dtype, const std::vector<LayerView>& layers);

}  // namespace gmp::cpu
