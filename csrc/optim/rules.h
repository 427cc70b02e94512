// The optimizers' rules: the state each keeps, and the constants they share. Adding a rule is a row in GMP_RULES, a
// function of its name in update_rule.h, and the constants that are new.
#pragma once

#include <cstdint>

// GMP_RULE(name, fewest arrays of state per weight, most).
#define GMP_RULES(GMP_RULE) \
  GMP_RULE(sgd, 0, 1)       \
  GMP_RULE(adam, 2, 3)      \
  GMP_RULE(average, 0, 0)

// GMP_CONSTANT(name, value if it is absent, which has no effect). Names follow torch.optim.
//
//   grad_factor   gradients are multiplied by it first
//   weight_decay  times the weight, is added to the gradient
//   decay         weights are multiplied by it first (decoupled weight decay)
//   lr .. first_step              of sgd; the last two are 0 or 1
//   one_minus_beta1 .. step_size  of adam; `average` moves the weight towards the "gradient" by one_minus_beta1
//   skip          not 0: nothing is written
#define GMP_CONSTANTS(GMP_CONSTANT)        \
  GMP_CONSTANT(grad_factor, 1.0)           \
  GMP_CONSTANT(weight_decay, 0.0)          \
  GMP_CONSTANT(decay, 1.0)                 \
  GMP_CONSTANT(lr, 0.0)                    \
  GMP_CONSTANT(momentum, 0.0)              \
  GMP_CONSTANT(one_minus_dampening, 1.0)   \
  GMP_CONSTANT(nesterov, 0.0)              \
  GMP_CONSTANT(first_step, 0.0)            \
  GMP_CONSTANT(one_minus_beta1, 0.0)       \
  GMP_CONSTANT(beta2, 0.0)                 \
  GMP_CONSTANT(one_minus_beta2, 0.0)       \
  GMP_CONSTANT(bias_correction2_sqrt, 1.0) \
  GMP_CONSTANT(eps, 0.0)                   \
  GMP_CONSTANT(step_size, 0.0)             \
  GMP_CONSTANT(skip, 0.0)

// Always inlined: the linker would merge functions that several instruction sets' translation units define, and the
// copy that stays could be one that this CPU cannot run.
#if defined(__CUDACC__)
#define GMP_INLINE __device__ __forceinline__
#else
#define GMP_INLINE inline __attribute__((always_inline))
#endif

namespace gmp {

enum class Rule : int {
#define GMP_RULE(name, fewest, most) name,
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
};

// Arrays of state per weight that each rule keeps: the fewest, and the most.
inline constexpr int kNumStates[][2] = {
#define GMP_RULE(name, fewest, most) {fewest, most},
    GMP_RULES(GMP_RULE)
#undef GMP_RULE
};
inline constexpr int kNumRules = sizeof(kNumStates) / sizeof(*kNumStates);
inline constexpr int kMaxStates = 3;  // of any rule

template <Rule kRule>
inline constexpr int kFewestStates = kNumStates[static_cast<int>(kRule)][0];
template <Rule kRule>
inline constexpr int kMostStates = kNumStates[static_cast<int>(kRule)][1];

// Constants of one tensor at one step, in the type the arithmetic runs in.
template <typename T>
struct UpdateConstants {
#define GMP_CONSTANT(name, absent) T name;
  GMP_CONSTANTS(GMP_CONSTANT)
#undef GMP_CONSTANT

  template <typename U>
  GMP_INLINE UpdateConstants<U> as() const {
#define GMP_CONSTANT(name, absent) static_cast<U>(name),
    return {GMP_CONSTANTS(GMP_CONSTANT)};
#undef GMP_CONSTANT
  }
};

}  // namespace gmp
