// The concatenation of all tensors, cut into chunks: the unit that threads take work in.
//
// Splitting by chunk and not by tensor keeps every thread busy whatever the mix of sizes, and a chunk stays in L2 while
// what follows from it is settled. Chunks begin on a byte of the mask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gmp::cpu {

inline constexpr int64_t kChunk = 16384;

struct Chunk {
  size_t tensor;
  int64_t begin, end;  // elements of that tensor
};

class ChunkTable {
 public:
  // Tensors of `sizes` elements, in this order.
  explicit ChunkTable(std::vector<int64_t> sizes) : sizes_(std::move(sizes)), first_chunk_{0} {
    for (int64_t n : sizes_) first_chunk_.push_back(first_chunk_.back() + (n + kChunk - 1) / kChunk);
  }

  int64_t size() const { return first_chunk_.back(); }
  int64_t first_of(size_t tensor) const { return first_chunk_[tensor]; }

  Chunk operator[](int64_t i) const {
    const auto after = std::upper_bound(first_chunk_.begin(), first_chunk_.end(), i);
    const size_t tensor = static_cast<size_t>(after - first_chunk_.begin()) - 1;
    const int64_t begin = (i - first_chunk_[tensor]) * kChunk;
    return {tensor, begin, std::min(begin + kChunk, sizes_[tensor])};
  }

 private:
  std::vector<int64_t> sizes_;
  std::vector<int64_t> first_chunk_;
};

// The sizes of things that have an n.
template <typename Tensors>
std::vector<int64_t> sizes_of(const Tensors& tensors) {
  std::vector<int64_t> sizes;
  for (const auto& tensor : tensors) sizes.push_back(tensor.n);
  return sizes;
}

}  // namespace gmp::cpu
