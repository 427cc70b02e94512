// The optimizer step, for every rule and dtype.
#include <type_traits>

#include "launch.h"
#include "names.h"
#include "update.cuh"

namespace gmp::cuda {
namespace {

// Calls visit(rule, dtype), both constants, for all combinations.
template <typename Visit>
void for_each_kernel(Visit visit) {
  const auto with_rule = [&](auto rule) {
#define GMP_DTYPE(name, key, infinity) visit(rule, std::integral_constant<DType, DType::name>{});
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  };
#define GMP_RULE(name, fewest, most) with_rule(std::integral_constant<Rule, Rule::name>{});
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
}

}  // namespace

void load_steps() {
  for_each_kernel([](auto rule, auto dtype) { load(kernels::update<rule, dtype>); });
}

void update(const Launch& launch, const std::string& name, uint64_t address, const std::vector<UpdatePart>& parts,
            uint64_t constants, const ArgumentConstants& argument) {
  const Rule wanted = rule_of(name);
  prepare(launch);
  for (const auto& [code, first_row, num_rows, num_chunks] : parts) {
    const auto* const rows = rows_at<const TensorRow>(address) + first_row;
    const int64_t row_count = num_rows, chunk_count = num_chunks;
    const auto wanted_dtype = static_cast<DType>(code);
    for_each_kernel([&](auto rule, auto dtype) {
      if (rule != wanted || dtype != wanted_dtype) return;
      const unsigned grid = grid_of(launch, kernels::kUpdaters<dtype>, chunk_count);
      GMP_LAUNCH((kernels::update<rule, dtype>), grid, launch, rows, row_count, chunk_count,
                 rows_at<const UpdateConstants<double>>(constants), argument);
    });
  }
}

}  // namespace gmp::cuda
