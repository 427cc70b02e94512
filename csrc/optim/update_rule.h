// THE arithmetic of the optimizers, in the order of torch.optim's single-tensor loops, fused where torch's vector loops
// fuse and nowhere else. V is one value or a vector of them; the includer gives GMP_RULE_INLINE, and fused(V, V, V),
// which rounds once, and square_root(V), which rounds right. Compile it with contraction off.
//
// Included inside a namespace, once per instruction set: see cpu/kernels_impl.h.

// torch's lerp: from the nearer end, so that weight 1 gives `to` exactly.
template <typename T, typename V>
GMP_RULE_INLINE V lerp(V from, V to, T weight) {
  return weight < T(0.5) ? fused(to - from, weight + V{}, from) : fused(to - from, (weight - T(1)) + V{}, to);
}

template <Rule kRule, typename T, typename V>
GMP_RULE_INLINE void update_one(V& w, V g, V& s0, V& s1, V& s2, bool has_momentum, bool has_maximum,
                                const UpdateConstants<T>& c) {
  if constexpr (kRule == Rule::average) {
    w = lerp<T>(w, g, c.one_minus_beta1);
    return;
  }
  if (c.grad_factor != T(1)) g = g * c.grad_factor;
  if (c.decay != T(1)) w = w * c.decay;
  if (c.weight_decay != T(0)) g = fused(w, c.weight_decay + V{}, g);
  if constexpr (kRule == Rule::sgd) {
    if (has_momentum) {
      s0 = c.first_step != T(0) ? g : fused(g, c.one_minus_dampening + V{}, s0 * c.momentum);
      g = c.nesterov != T(0) ? fused(s0, c.momentum + V{}, g) : s0;
    }
    w = fused(g, -c.lr + V{}, w);
  } else {
    s0 = lerp<T>(s0, g, c.one_minus_beta1);
    s1 = fused(c.one_minus_beta2 * g, g, s1 * c.beta2);
    V second = s1;
    if (has_maximum) {
      // torch.maximum hands a NaN on, from either side.
      s2 = ((s2 > s1) | (s2 != s2)) ? s2 : s1;
      second = s2;
    }
    const V denominator = square_root(second) / c.bias_correction2_sqrt + c.eps;
    w = w + (-c.step_size) * s0 / denominator;
  }
}
