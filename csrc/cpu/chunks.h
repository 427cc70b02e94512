// The concatenation of all tensors, cut into chunks: the unit that threads take work in.
//
// Splitting by chunk instead of tensor keeps every thread busy for any mix of sizes, and a chunk stays in L2 until all
// work on it is done. Chunks begin at the beginning of a mask byte.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "layers.h"

namespace gmp::cpu {

struct Chunk {
  size_t tensor;
  int64_t begin, end;  // elements of that tensor
  // Results of a count: how many of its keys are inside, and how many candidates of its group come before them.
  int64_t inside = 0, offset = 0;
};

inline void add_chunks(std::vector<Chunk>& chunks, size_t tensor, int64_t n, int64_t size = kChunk) {
  for (int64_t begin = 0; begin < n; begin += size) chunks.push_back({tensor, begin, std::min(begin + size, n)});
}

// Chunks of things that have an n, in this order.
template <typename Tensors>
std::vector<Chunk> chunks_of(const Tensors& tensors) {
  std::vector<Chunk> chunks;
  chunks.reserve(tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) add_chunks(chunks, t, tensors[t].n);
  return chunks;
}

// How many threads to wake for this many pieces of work, of which each takes `grain` at a time: to wake one for nothing
// takes longer than a step of a few small tensors.
inline int threads_for(int64_t num_pieces, int64_t grain, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>((num_pieces + grain - 1) / grain, 1, num_threads));
}

}  // namespace gmp::cpu
