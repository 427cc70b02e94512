// The order of weights in memory where it is not the row-major order of the flat index.
//
// In channels_last the weights of an output channel are one filter, in memory as in row-major order, and the filters
// follow each other alike. Inside a filter, row-major order has the positions of a channel side by side, and memory the
// channels of a position. So all counts may be taken in the order of memory. Only to find a flat index, one filter is
// walked in row-major order.
#pragma once

#include <cstdint>

namespace gmp {

// A layer whose memory is in row-major order has filters of one weight.
struct Filter {
  int64_t channels = 1, positions = 1;

  constexpr int64_t size() const { return channels * positions; }
  // Place in row-major order of a weight of the filter, given its place in memory.
  constexpr int64_t in_row_major(int64_t i) const { return i % channels * positions + i / channels; }
  // The inverse: the place in memory of a weight, given that in row-major order.
  constexpr int64_t in_memory(int64_t i) const { return i % positions * channels + i / positions; }
  // The end of the filter in which an index lies; an index between two filters is itself the end of one.
  constexpr int64_t end_of(int64_t index) const { return (index + size() - 1) / size() * size(); }
};

}  // namespace gmp
