// A parameter in an optimizer step, or one chunk of it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/rules.h"
#include "order/dtypes.h"

namespace gmp::cpu {

struct UpdateTensor {
  DType dtype;
  void* weights;
  const void* grads;
  void* master;             // copy in the type of the arithmetic, which runs on it: weights are then only written; or
                            // nullptr
  void* state[kMaxStates];  // in the same type; the first num_states of them are there
  int num_states;
  const uint8_t* mask;           // packed bits; nullptr: everything is kept
  const int64_t* chunk_offsets;  // compact state: kept weights before each chunk of kChunk, and their number; else
                                 // nullptr
  int64_t n;
  size_t constants;  // which of a step's
};

}  // namespace gmp::cpu
