// The masked optimizer step: one pass over all tensors, in which pruned weights cost nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "order/dtypes.h"
#include "update.h"

namespace gmp::cpu {

struct UpdateTensor {
  DType dtype;
  UpdateRun run;         // the whole tensor
  const int64_t* ranks;  // compact state: kept weights before each chunk of
                         // kChunk, and their number; else nullptr
  size_t constants;      // which of the constants
};

// Same for all tensors: the rule. Threads take chunks; no bit depends on how many there are. Throws
// std::invalid_argument, and has written nothing, if a mask does not keep what the ranks of compact state say.
void update(Rule rule, const std::vector<UpdateTensor>& tensors, const std::vector<UpdateConstants<double>>& constants,
            int num_threads);

struct GradView {
  DType dtype;
  const void* grads;
  int64_t n;
  const uint8_t* mask;
};

// Sum of the squares of the kept gradients of all tensors; the order of the additions is fixed.
double sum_squares(const std::vector<GradView>& grads, int num_threads);

// One tensor of optimizer state in a layout: dense (mask is nullptr: n values) or compact (the kept values only, in
// order).
struct StateView {
  void* values;
  const uint8_t* mask;
  const int64_t* ranks;
};

// One on its way from one layout to another; a value that is kept before but not after is dropped, one kept after but
// not before becomes zero.
struct RepackTask {
  StateView from, to;
  int64_t n;
  int value_bytes;  // 4 or 8
};

// Throws as update() does.
void repack(const std::vector<RepackTask>& tasks, int num_threads);

// Kept weights before each chunk of kChunk, and their number: (n + kChunk - 1) / kChunk + 1 entries.
std::vector<int64_t> ranks_of(const uint8_t* mask, int64_t n);

}  // namespace gmp::cpu
