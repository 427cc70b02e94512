// What Python calls dtypes, rules and constants.
#pragma once

#include <cstring>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

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

// The fields of UpdateConstants in order, and what they are where absent: without effect.
inline constexpr std::pair<const char*, double> kConstants[] = {
    {"grad_factor", 1.0}, {"weight_decay", 0.0},    {"decay", 1.0},
    {"lr", 0.0},          {"momentum", 0.0},        {"one_minus_dampening", 1.0},
    {"nesterov", 0.0},    {"first_step", 0.0},      {"one_minus_beta1", 0.0},
    {"beta2", 0.0},       {"one_minus_beta2", 0.0}, {"bias_correction2_sqrt", 1.0},
    {"eps", 0.0},         {"step_size", 0.0},       {"skip", 0.0},
};

inline UpdateConstants<double> constants_of(const std::map<std::string, double>& given) {
  double values[std::size(kConstants)];
  for (size_t i = 0; i < std::size(kConstants); ++i) {
    const auto found = given.find(kConstants[i].first);
    values[i] = found == given.end() ? kConstants[i].second : found->second;
  }
  UpdateConstants<double> constants;
  static_assert(sizeof(constants) == sizeof(values));
  std::memcpy(&constants, values, sizeof(values));
  return constants;
}

}  // namespace gmp
