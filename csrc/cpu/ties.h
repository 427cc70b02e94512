// Weights of one key, counted between flat indices.
#pragma once

#include <vector>

#include "layers.h"

namespace gmp::cpu {

// A box of a tensor, per dimension. The flat indices of its weights ascend in the tensor as they do in the box.
class Region {
 public:
  // From the outermost dimension on.
  void add_side(int64_t whole, int64_t offset, int64_t size) {
    sides_.push_back({whole, offset, size});
    numel_ *= size;
  }

  int64_t numel() const { return numel_; }

  int64_t in_whole(int64_t index) const {
    int64_t result = 0, stride = 1;
    for (size_t i = sides_.size(); i-- > 0;) {
      const auto& [whole, offset, size] = sides_[i];
      result += (index % size + offset) * stride;
      index /= size;
      stride *= whole;
    }
    return result;
  }

 private:
  struct Side {
    int64_t whole, offset, size;
  };

  std::vector<Side> sides_;
  int64_t numel_ = 1;
};

// Ties to be counted in a layer.
struct TieSearch {
  LayerView layer;
  const Region* region;  // that the layer is of a whole
  uint64_t key;
  // Flat indices of the layer. Ties of [first, begin) and of [end, last) are only counted. Those of [begin, end) are
  // counted by the slot in which their flat index in the whole lies. Slots of 1 << shift indices begin at `start`.
  int64_t first, begin, end, last, start;
  int shift;
};

// Counts unpruned weights. `counts` has a row for each search, to which they are added: those before the slots, those
// of each slot, and those after. Reads only the weights between the first index and the last. `indices` (nullptr: not
// wanted; else there is a single slot) has room for `capacity` indices for each search: it receives those in the whole,
// from `start` on, of as many ties in the slot, in any order.
void count_slots(const std::vector<TieSearch>& searches, int64_t num_slots, int64_t* counts, int64_t* indices,
                 int64_t capacity, int num_threads);

}  // namespace gmp::cpu
