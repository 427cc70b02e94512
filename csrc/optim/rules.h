// The optimizers' rules: the state each keeps, the constants they share, and the arithmetic, one source for CPU vectors
// and CUDA threads. A new rule takes a row in GMP_RULES, a function of its name, and its new constants.
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

// The arithmetic, in the order of torch.optim's single-tensor loops, fused where torch's vector loops fuse and nowhere
// else: compile it with contraction off. V is one value or a vector of them, T the type of a value. Arithmetic has
// fused(V, V, V), which rounds once, and square_root(V), which rounds correctly.
namespace rules {

// Interpolates as torch does, from the nearer end, so that weight 1 gives `to` exactly.
template <typename Arithmetic, typename T, typename V>
GMP_INLINE V lerp(V from, V to, T weight) {
  return weight < T(0.5) ? Arithmetic::fused(to - from, weight + V{}, from)
                         : Arithmetic::fused(to - from, (weight - T(1)) + V{}, to);
}

// Both kinds of weight decay, and the factor of the gradient.
template <typename Arithmetic, typename T, typename V>
GMP_INLINE void scale(V& w, V& g, const UpdateConstants<T>& c) {
  if (c.grad_factor != T(1)) g = g * c.grad_factor;
  if (c.decay != T(1)) w = w * c.decay;
  if (c.weight_decay != T(0)) g = Arithmetic::fused(w, c.weight_decay + V{}, g);
}

// State: momentum, or nothing.
template <typename Arithmetic, typename T, typename V>
GMP_INLINE void sgd(V& w, V g, V (&state)[kMaxStates], int num_states, const UpdateConstants<T>& c) {
  scale<Arithmetic>(w, g, c);
  if (num_states > 0) {
    V& momentum = state[0];
    momentum = c.first_step != T(0) ? g : Arithmetic::fused(g, c.one_minus_dampening + V{}, momentum * c.momentum);
    g = c.nesterov != T(0) ? Arithmetic::fused(momentum, c.momentum + V{}, g) : momentum;
  }
  w = Arithmetic::fused(g, -c.lr + V{}, w);
}

// State: exp_avg, exp_avg_sq, and of AMSGrad max_exp_avg_sq.
template <typename Arithmetic, typename T, typename V>
GMP_INLINE void adam(V& w, V g, V (&state)[kMaxStates], int num_states, const UpdateConstants<T>& c) {
  scale<Arithmetic>(w, g, c);
  auto& [average, squares, maximum] = state;
  average = lerp<Arithmetic>(average, g, c.one_minus_beta1);
  squares = Arithmetic::fused(c.one_minus_beta2 * g, g, squares * c.beta2);
  V second = squares;
  if (num_states > 2) {
    // torch.maximum passes NaN on, from either side.
    maximum = ((maximum > squares) | (maximum != maximum)) ? maximum : squares;
    second = maximum;
  }
  const V denominator = Arithmetic::square_root(second) / c.bias_correction2_sqrt + c.eps;
  w = w + (-c.step_size) * average / denominator;
}

// A running average of weights: the "gradient" is the new weight.
template <typename Arithmetic, typename T, typename V>
GMP_INLINE void average(V& w, V g, V (&)[kMaxStates], int, const UpdateConstants<T>& c) {
  w = lerp<Arithmetic>(w, g, c.one_minus_beta1);
}

}  // namespace rules

// One step of a weight `w` with gradient `g`, or of a vector of them, by one of the rules. The first `num_states`
// arrays of the state exist.
template <Rule kRule, typename Arithmetic, typename T, typename V>
GMP_INLINE void update_one(V& w, V g, V (&state)[kMaxStates], int num_states, const UpdateConstants<T>& c) {
  static_assert(kMostStates<kRule> <= kMaxStates);
#define GMP_RULE(name, fewest, most) \
  if constexpr (kRule == Rule::name) rules::name<Arithmetic>(w, g, state, num_states, c);
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
}

}  // namespace gmp
