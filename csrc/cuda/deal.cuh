// Assignment of chunks to the blocks of a selection.
#pragma once

#include "device.cuh"

namespace gmp::cuda::kernels {

// Blocks take contiguous runs of chunks, as elsewhere. But the work that a block does once per group takes about as
// long as a chunk, and one block could get many small groups while others wait. So each group but the first counts as
// one more chunk: it has one more place, before those of its chunks. A block that has only such a place has nothing to
// do. If there is a block for each chunk, only chunks are dealt out.
class Deal {
 public:
  __device__ Deal(const Tables& tables, int64_t num_blocks)
      : padding_(tables.num_chunks > num_blocks ? 1 : 0),
        num_places_(tables.num_chunks + padding_ * (tables.num_groups - 1)),
        num_blocks_(num_blocks) {}

  // The block that takes a chunk of group g. Later chunks have later places, and no earlier blocks.
  __device__ int64_t block_of(int64_t chunk, int64_t g) const {
    return ((chunk + padding_ * g + 1) * num_blocks_ - 1) / num_places_;
  }

  // The blocks from that of the group's first chunk to that of its last; all between have chunks of this group only.
  __device__ int64_t num_blocks_of(const GroupRow& group, int64_t g) const {
    return block_of(group.first_chunk + group.num_chunks - 1, g) - block_of(group.first_chunk, g) + 1;
  }

  // The first chunk of group g that a block takes. For the block after the group's last one, any chunk after its last.
  __device__ int64_t first_chunk_of(int64_t block, const GroupRow& group, int64_t g) const {
    const int64_t chunk = first_place_of(block) - padding_ * g;
    return chunk < group.first_chunk ? group.first_chunk : chunk;
  }

  // Calls visit(g, first chunk, last chunk) for each group's part of this block's chunks; the last is not included.
  template <typename Visit>
  __device__ __forceinline__ void for_each_run(const GroupRow* groups, int64_t num_groups, Visit visit) const {
    const int64_t place = first_place_of(blockIdx.x);
    const int64_t g = row_of(groups, num_groups, place, padding_);
    const int64_t last = first_place_of(blockIdx.x + 1) - padding_ * g;
    for_each_run_from(groups, num_groups, static_cast<int>(g),
                      static_cast<int>(first_chunk_of(blockIdx.x, groups[g], g)), static_cast<int>(last),
                      static_cast<int>(padding_), visit);
  }

 private:
  __device__ int64_t first_place_of(int64_t block) const { return block * num_places_ / num_blocks_; }

  const int64_t padding_, num_places_, num_blocks_;
};

}  // namespace gmp::cuda::kernels
