// The optimizer step, for every rule and dtype.
#include <type_traits>

#include "launch.h"
#include "names.h"
#include "update.cuh"

namespace gmp::cuda {
namespace {

// Calls visit(rule, dtype, dtype of the state), all constants, for all combinations.
template <typename Visit>
void for_each_kernel(Visit visit) {
  const auto with_dtypes = [&](auto rule, auto dtype) {
    constexpr DType kWide = kComputeDType<dtype>;
    visit(rule, dtype, std::integral_constant<DType, kWide>{});
    if constexpr (kMostStates<rule> > 0 && kWide == DType::float32) {
      visit(rule, dtype, std::integral_constant<DType, DType::bfloat16>{});
    }
  };
  const auto with_rule = [&](auto rule) {
#define GMP_DTYPE(name, key, infinity) with_dtypes(rule, std::integral_constant<DType, DType::name>{});
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  };
#define GMP_RULE(name, fewest, most) with_rule(std::integral_constant<Rule, Rule::name>{});
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
}

}  // namespace

void load_steps() {
  for_each_kernel([](auto rule, auto dtype, auto state) { load(kernels::update<rule, dtype, state>); });
}

void update(const Launch& launch, const std::string& name, uint64_t address, const std::vector<UpdatePart>& parts,
            uint64_t constants, const ArgumentConstants& argument) {
  const Rule wanted = rule_of(name);
  const auto for_kernel_of = [&](const UpdatePart& part, auto visit) {
    for_each_kernel([&](auto rule, auto dtype, auto state) {
      const bool is_wanted = rule == wanted && dtype == static_cast<DType>(std::get<0>(part)) &&
                             state == static_cast<DType>(std::get<1>(part));
      if (is_wanted) visit(rule, dtype, state);
    });
  };
  // Before anything is written.
  for (const UpdatePart& part : parts) {
    bool has_kernel = false;
    for_kernel_of(part, [&](auto, auto, auto) { has_kernel = true; });
    if (!has_kernel) {
      throw std::invalid_argument(
          std::string("expected state of float32 or bfloat16, or of float64 for float64 weights, "
                      "got ") +
          name_of(static_cast<DType>(std::get<1>(part))));
    }
  }
  prepare(launch);
  for (const UpdatePart& part : parts) {
    const auto* const rows = rows_at<const TensorRow>(address) + std::get<2>(part);
    const auto num_rows = std::get<3>(part), num_chunks = std::get<4>(part);
    for_kernel_of(part, [&](auto rule, auto dtype, auto state) {
      const unsigned grid = grid_of(launch, kernels::kUpdaters<dtype>, num_chunks);
      GMP_LAUNCH((kernels::update<rule, dtype, state>), grid, launch, rows, num_rows, num_chunks,
                 rows_at<const UpdateConstants<double>>(constants), argument);
    });
  }
}

}  // namespace gmp::cuda
