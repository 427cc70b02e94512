// The optimizer step, for every rule and dtype.
#include "launch.h"
#include "update.cuh"

namespace gmp::cuda {
namespace {

// Calls visit(format) with the format of the dtype.
template <typename Visit>
void with_format(DType dtype, Visit visit) {
  switch (dtype) {
#define GMP_DTYPE(name, key, infinity) \
  case DType::name:                    \
    return visit(kernels::FormatOf<DType::name>{});
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
}

template <Rule kRule>
void update_by(const Launch& launch, DType dtype, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
               const UpdateConstants<double>* constants, const ArgumentConstants& argument) {
  with_format(dtype, [&](auto format) {
    using Format = decltype(format);
    const unsigned grid = grid_of(launch, kernels::kUpdaters<Format>, num_chunks);
    GMP_LAUNCH((kernels::update<kRule, Format>), grid, launch, rows, num_rows, num_chunks, constants, argument);
  });
}

template <Rule kRule>
void load_rule() {
#define GMP_DTYPE(name, key, infinity) load(kernels::update<kRule, kernels::FormatOf<DType::name>>);
  GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
}

}  // namespace

void load_steps(const Launch& launch) {
  prepare(launch);
#define GMP_RULE(name, fewest, most) load_rule<Rule::name>();
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
}

void update(const Launch& launch, DType dtype, Rule rule, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
            const UpdateConstants<double>* constants, const ArgumentConstants& argument) {
  prepare(launch);
  switch (rule) {
#define GMP_RULE(name, fewest, most) \
  case Rule::name:                   \
    return update_by<Rule::name>(launch, dtype, rows, num_rows, num_chunks, constants, argument);
    GMP_RULES(GMP_RULE)
#undef GMP_RULE
  }
}

}  // namespace gmp::cuda
