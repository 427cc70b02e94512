// What Python calls dtypes, rules and constants.
#pragma once

#include <map>
#include <stdexcept>
#include <string>

#include "dtypes.h"
#include "update_constants.h"

namespace gmp {

inline DType dtype_of(const std::string& name) {
#define GMP_DTYPE(dtype, key, infinity) \
  if (name == #dtype) return DType::dtype;
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  throw std::invalid_argument("unknown dtype '" + name + "'");
}

inline Rule rule_of(const std::string& name) {
  if (name == "sgd") return Rule::sgd;
  if (name == "adam") return Rule::adam;
  if (name == "average") return Rule::average;
  throw std::invalid_argument("unknown rule '" + name + "'");
}

// Absent constants change nothing.
inline UpdateConstants<double> constants_of(const std::map<std::string, double>& given) {
  const auto get = [&](const char* name, double otherwise) {
    const auto found = given.find(name);
    return found == given.end() ? otherwise : found->second;
  };
  return {get("grad_factor", 1.0),
          get("weight_decay", 0.0),
          get("decay", 1.0),
          get("lr", 0.0),
          get("momentum", 0.0),
          get("one_minus_dampening", 1.0),
          get("nesterov", 0.0) != 0.0,
          get("first_step", 0.0) != 0.0,
          get("one_minus_beta1", 0.0),
          get("beta2", 0.0),
          get("one_minus_beta2", 0.0),
          get("bias_correction2_sqrt", 1.0),
          get("eps", 0.0),
          get("step_size", 0.0)};
}

}  // namespace gmp
