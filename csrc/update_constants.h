// The optimizers' rules and their constants, for every kernel.
#pragma once

namespace gmp {

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
  T nesterov, first_step;  // 0 or 1
  // adam; `average` moves the weight towards the "gradient" by one_minus_beta1
  T one_minus_beta1, beta2, one_minus_beta2, bias_correction2_sqrt, eps, step_size;
  T skip;  // not 0: nothing is written

  template <typename U>
  constexpr UpdateConstants<U> as() const {
    return {static_cast<U>(grad_factor), static_cast<U>(weight_decay),    static_cast<U>(decay),
            static_cast<U>(lr),          static_cast<U>(momentum),        static_cast<U>(one_minus_dampening),
            static_cast<U>(nesterov),    static_cast<U>(first_step),      static_cast<U>(one_minus_beta1),
            static_cast<U>(beta2),       static_cast<U>(one_minus_beta2), static_cast<U>(bias_correction2_sqrt),
            static_cast<U>(eps),         static_cast<U>(step_size),       static_cast<U>(skip)};
  }
};

}  // namespace gmp
