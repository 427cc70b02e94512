// The masked optimizer step: one pass over all tensors, in which pruned weights cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layers.h"

namespace gmp::cpu {

// The rule is the same for all tensors. Threads take chunks; no bit depends on their number. Throws
// std::invalid_argument before any write if a mask does not match the offsets of compact state.
void update(Rule rule, const std::vector<UpdateTensor>& tensors, const std::vector<UpdateConstants<double>>& constants,
            int num_threads);

// Sum of the squares of the kept gradients; the order of the additions is fixed.
double sum_squares(const std::vector<LayerView>& gradients, int num_threads);

// Copies state, the first array of each source, into the layout of the target at the same place: dense (no mask: n
// values), or compact (the kept values only, in order). A value that is kept before but not after is dropped, one kept
// after but not before becomes zero. Values are of the source's dtype. Throws as update() does.
void move_state(const std::vector<UpdateTensor>& sources, const std::vector<UpdateTensor>& targets, int num_threads);

// Kept weights before each chunk of kChunk, and their number: (n + kChunk - 1) / kChunk + 1 entries.
std::vector<int64_t> chunk_offsets(const uint8_t* mask, int64_t n);

}  // namespace gmp::cpu
