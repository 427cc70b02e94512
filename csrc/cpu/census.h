// Selection in the open: counts against brackets that somebody else chooses. What pieces of a layer find adds up, so
// the same two operations serve a layer spread over ranks, or a file that is read piece by piece.
#pragma once

#include <cstdint>
#include <vector>

#include "order/dtypes.h"
#include "select.h"

namespace gmp::cpu {

// An interval of keys, both ends included; empty if lo > hi.
struct Bracket {
  uint64_t lo, hi;
};

// Where the keys inside a bracket go, in no particular order; capacity 0: nowhere.
struct Room {
  void* keys;
  int64_t capacity;
};

struct Census {
  int64_t below = 0;       // unpruned keys < lo
  int64_t inside = 0;      // unpruned keys in [lo, hi]; more than the room has: not all of them are there
  int64_t pruned = 0;      // mask bits that are 0
  int64_t nonfinite = -1;  // index of the first unpruned NaN or Inf
};

// The brackets that select() would start from; num_prune as there. Reads a sample.
std::vector<Bracket> sample(DType dtype, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune,
                            int num_threads);

// One bracket, one room and a row of `bins` per layer; a key inside is counted in bin (key - lo) >> shift, with the
// smallest shift that fits the bracket. Adds to `bins`. Reads every weight once.
std::vector<Census> count(DType dtype, const std::vector<LayerView>& layers, const std::vector<Bracket>& brackets,
                          const std::vector<Room>& rooms, int64_t* bins, int64_t num_bins, int num_threads);

}  // namespace gmp::cpu
