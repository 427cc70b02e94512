// The concatenation of all layers, cut into chunks: the unit that threads take work in.
//
// Splitting by chunk and not by layer keeps every thread busy whatever the mix of sizes, and a chunk stays in L2 while
// what follows from it is settled. Chunks begin on a byte of the mask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "select.h"

namespace gmp::cpu {

inline constexpr int64_t kChunk = 16384;

struct Chunk {
  size_t layer;
  int64_t begin, end;  // elements of that layer
};

class ChunkTable {
 public:
  // The layers are those at `indices` of a longer list.
  ChunkTable(const std::vector<LayerView>& layers, std::vector<size_t> indices)
      : layers_(&layers), indices_(std::move(indices)), first_chunk_{0} {
    for (size_t layer : indices_) first_chunk_.push_back(first_chunk_.back() + (layers[layer].n + kChunk - 1) / kChunk);
  }

  int64_t size() const { return first_chunk_.back(); }

  Chunk operator[](int64_t i) const {
    const auto after = std::upper_bound(first_chunk_.begin(), first_chunk_.end(), i);
    const size_t position = static_cast<size_t>(after - first_chunk_.begin()) - 1;
    const size_t layer = indices_[position];
    const int64_t begin = (i - first_chunk_[position]) * kChunk;
    return {layer, begin, std::min(begin + kChunk, (*layers_)[layer].n)};
  }

  // First chunk of the layer at `position` of `indices`.
  int64_t first_of(size_t position) const { return first_chunk_[position]; }

 private:
  const std::vector<LayerView>* layers_;
  std::vector<size_t> indices_;
  std::vector<int64_t> first_chunk_;
};

}  // namespace gmp::cpu
