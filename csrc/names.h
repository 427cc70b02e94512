// Python's names of dtypes, rules and constants.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "optim/rules.h"
#include "order/dtypes.h"

namespace gmp {

inline DType dtype_of(const std::string& name) {
#define GMP_DTYPE(dtype, key, infinity) \
  if (name == #dtype) return DType::dtype;
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  throw std::invalid_argument("unknown dtype '" + name + "'");
}

inline const char* name_of(DType dtype) {
#define GMP_DTYPE(name, key, infinity) \
  if (dtype == DType::name) return #name;
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  return "an unknown dtype";
}

inline Rule rule_of(const std::string& name) {
#define GMP_RULE(rule, fewest, most) \
  if (name == #rule) return Rule::rule;
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
  throw std::invalid_argument("unknown rule '" + name + "'");
}

// Constants in order, with the values that absent ones have.
inline constexpr std::pair<const char*, double> kConstants[] = {
#define GMP_CONSTANT(name, absent) {#name, absent},
    GMP_CONSTANTS(GMP_CONSTANT)
#undef GMP_CONSTANT
};

}  // namespace gmp
