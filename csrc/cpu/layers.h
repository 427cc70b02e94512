// Layers in the form that all loops get.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/rules.h"
#include "order/dtypes.h"
#include "order/memory_order.h"

namespace gmp::cpu {

// Weights of a layer that a thread takes at a time.
inline constexpr int64_t kChunk = 16384;

constexpr int64_t num_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

struct LayerView {
  DType dtype;
  void* weights;        // any alignment
  int64_t n;            // > 0
  const uint8_t* mask;  // packed bits, or nullptr: nothing pruned yet
  Filter filter = {};
};

// A layer in an optimizer step; or an array of state that belongs to it: then what does not is nullptr.
struct UpdateTensor : LayerView {
  const void* grads;
  void* master;             // copy in the type of the arithmetic, which runs on it: weights are then only written; or
                            // nullptr
  void* state[kMaxStates];  // the first num_states of them are there
  int num_states;
  DType state_dtype;             // that of the arithmetic, or bfloat16 instead of float32
  const int64_t* chunk_offsets;  // compact state: kept weights before each chunk of kChunk, and their number; else
                                 // nullptr
  size_t constants;              // which of a step's
};

}  // namespace gmp::cpu
