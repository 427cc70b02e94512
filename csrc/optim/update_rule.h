// THE optimizers' rules, one source for CPU vectors and CUDA threads: their rows, and with GMP_RULE_FUNCTIONS their
// arithmetic. Adding a rule is a row in GMP_RULES, a function of its name, and the constants that are new.
#ifndef GMP_RULES

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
//   rounding_seed of the rounding of bfloat16 state, an integer below 2**24; see rounded_at_random
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
  GMP_CONSTANT(rounding_seed, 0.0)         \
  GMP_CONSTANT(skip, 0.0)

// Parts of the rules that most constants make no use of. GMP_PART(name, whether the constants `c` use it).
#define GMP_PARTS(GMP_PART)              \
  GMP_PART(coupled, c.weight_decay != 0) \
  GMP_PART(first, c.first_step != 0)     \
  GMP_PART(nesterov, c.nesterov != 0)    \
  GMP_PART(far, !(c.one_minus_beta1 < 0.5f))

#endif

// The arithmetic is in the order of torch.optim's single-tensor loops, fused where torch's vector loops fuse and
// nowhere else: compile it with contraction off. V is one value or a vector of them, C the constants (see rules.h).
//
// Included inside a namespace that has fused(V, V, V), which rounds once, and square_root(V), which rounds right.
#ifdef GMP_RULE_FUNCTIONS
#undef GMP_RULE_FUNCTIONS

namespace rules {

// torch's lerp: from the nearer end, so that weight 1 gives `to` exactly.
template <typename V, typename C>
GMP_INLINE V lerp(V from, V to, const C& c) {
  const auto weight = c.one_minus_beta1;
  return c.uses(Part::far) ? fused(to - from, (weight - 1) + V{}, to) : fused(to - from, weight + V{}, from);
}

// Both kinds of weight decay, and the factor of the gradient.
template <typename V, typename C>
GMP_INLINE void scale(V& w, V& g, const C& c) {
  g = g * c.grad_factor;
  w = w * c.decay;
  if (c.uses(Part::coupled)) g = fused(w, c.weight_decay + V{}, g);
}

// State: momentum, or nothing.
template <typename V, typename C>
GMP_INLINE void sgd(V& w, V g, V (&state)[kMaxStates], int num_states, const C& c) {
  scale(w, g, c);
  if (num_states > 0) {
    V& momentum = state[0];
    momentum = c.uses(Part::first) ? g : fused(g, c.one_minus_dampening + V{}, momentum * c.momentum);
    g = c.uses(Part::nesterov) ? fused(momentum, c.momentum + V{}, g) : momentum;
  }
  w = fused(g, -c.lr + V{}, w);
}

// State: exp_avg, exp_avg_sq, and of AMSGrad max_exp_avg_sq.
template <typename V, typename C>
GMP_INLINE void adam(V& w, V g, V (&state)[kMaxStates], int num_states, const C& c) {
  scale(w, g, c);
  auto& [average, squares, maximum] = state;
  average = lerp(average, g, c);
  squares = fused(c.one_minus_beta2 * g, g, squares * c.beta2);
  V second = squares;
  if (num_states > 2) {
    // torch.maximum hands a NaN on, from either side.
    maximum = ((maximum > squares) | (maximum != maximum)) ? maximum : squares;
    second = maximum;
  }
  const V denominator = square_root(second) / c.bias_correction2_sqrt + c.eps;
  w = w + (-c.step_size) * average / denominator;
}

// An average of weights: the "gradient" is what comes in.
template <typename V, typename C>
GMP_INLINE void average(V& w, V g, V (&)[kMaxStates], int, const C& c) {
  w = lerp(w, g, c);
}

}  // namespace rules

// One step of a weight `w` with gradient `g`, or of a vector of them, by one of the rules. Of the state, the first
// `num_states` arrays are there.
template <Rule kRule, typename V, typename C>
GMP_INLINE void update_one(V& w, V g, V (&state)[kMaxStates], int num_states, const C& c) {
  static_assert(kMostStates<kRule> <= kMaxStates);
#define GMP_RULE(name, fewest, most) \
  if constexpr (kRule == Rule::name) rules::name(w, g, state, num_states, c);
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
}

#endif
