// One optimizer step over the weights of one chunk: what an instruction set provides.
#pragma once

#include <cstdint>

#include "optim/rules.h"

namespace gmp::cpu {

// A run of n weights. Every pointer is at the run's first element; `mask` is on a byte boundary.
struct UpdateRun {
  void* weights;
  const void* grads;
  void* master;         // float copy the arithmetic runs on (weights are then only
                        // written), or nullptr
  void* state[3];       // sgd: momentum; adam: exp_avg, exp_avg_sq, max_exp_avg_sq;
                        // nullptr: not there
  const uint8_t* mask;  // nullptr: everything is kept
  bool compact;         // state holds the kept weights only, beginning with the run's
                        // first
  int64_t n;
};

template <typename T>
using UpdateFunction = void (*)(const UpdateRun&, const UpdateConstants<T>&);

}  // namespace gmp::cpu
