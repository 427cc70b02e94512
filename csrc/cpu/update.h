// One optimizer step over the weights of one chunk: the rules, their constants, and what an instruction set provides.
#pragma once

#include <cstdint>

namespace gmp::cpu {

enum class Rule : int { sgd, adam, average };

// Constants of one tensor at one step, in the type the arithmetic runs in.
// Names follow torch.optim.
template <typename T>
struct UpdateConstants {
  T grad_factor;   // gradients are multiplied by it first; 1: not at all
  T weight_decay;  // times the weight, is added to the gradient; 0: not at all
  T decay;         // weights are multiplied by it first (decoupled weight decay); 1:
                   // not at all
  // sgd
  T lr, momentum, one_minus_dampening;
  bool nesterov, first_step;
  // adam; `average` moves the weight towards the "gradient" by one_minus_beta1
  T one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, eps, step_size;
};

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
