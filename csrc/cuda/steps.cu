// The optimizer step, for every rule and dtype.
#include "launch.h"
#include "update.cuh"

namespace gmp::cuda {
namespace {

struct Step {
  const Launch& launch;
  const UpdateRow* rows;
  int64_t num_rows, num_chunks;
  const UpdateConstants<double>* constants;
  const ArgumentConstants& argument;
};

template <Rule kRule, typename Format>
void launch_step(const Step& s) {
  const unsigned grid = grid_of(s.launch, kernels::kUpdaters<Format>, s.num_chunks);
  GMP_LAUNCH((kernels::update<kRule, Format>), grid, s.launch, s.rows, s.num_rows, s.num_chunks, s.constants,
             s.argument);
}

template <Rule kRule>
void update_by(const Step& step, DType dtype) {
  switch (dtype) {
    case DType::float32:
      return launch_step<kRule, kernels::Wide<float>>(step);
    case DType::float64:
      return launch_step<kRule, kernels::Wide<double>>(step);
    case DType::float16:
      return launch_step<kRule, kernels::Float16>(step);
    case DType::bfloat16:
      return launch_step<kRule, kernels::BFloat16>(step);
  }
}

}  // namespace

void update(const Launch& launch, DType dtype, Rule rule, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
            const UpdateConstants<double>* constants, const ArgumentConstants& argument) {
  prepare(launch);
  const Step step{launch, rows, num_rows, num_chunks, constants, argument};
  switch (rule) {
    case Rule::sgd:
      return update_by<Rule::sgd>(step, dtype);
    case Rule::adam:
      return update_by<Rule::adam>(step, dtype);
    case Rule::average:
      return update_by<Rule::average>(step, dtype);
  }
}

}  // namespace gmp::cuda
