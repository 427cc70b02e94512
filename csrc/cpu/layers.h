// Layers in the form that all loops get.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/rules.h"
#include "order/dtypes.h"
#include "order/memory_order.h"
#include "order/pattern.h"

namespace gmp::cpu {

// Weights of a layer that a thread takes at a time.
inline constexpr int64_t kChunk = 16384;

constexpr int64_t num_chunks(int64_t n) { return (n + kChunk - 1) / kChunk; }

// How the weights of a layer are ranked, if not each by its own magnitude.
struct Ranking {
  Pattern pattern = {};
  DType source_dtype = {};   // of what ranks them: the weights, or scores
  DType weights_dtype = {};  // of the weights
  void* weights = nullptr;   // nullptr: each by its own magnitude
  int64_t num_weights = 0;
  Filter filter = {};  // of the weights
};

// For a layer with a ranking of its own: dtype, n and filter are those of what is ranked, `weights` what ranks them,
// and the mask is that of the weights. See ranked.h.
struct LayerView {
  DType dtype;
  void* weights;        // any alignment
  int64_t n;            // > 0
  const uint8_t* mask;  // packed bits, or nullptr: nothing pruned yet
  Filter filter = {};
  Ranking ranking = {};

  bool is_plain() const { return ranking.weights == nullptr; }
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
