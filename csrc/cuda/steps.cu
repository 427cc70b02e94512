// The optimizer step, for every rule, dtype, and dtype of what is ranked along the way.
#include "launch.h"
#include "update.cuh"

namespace gmp::cuda {
namespace {

struct Step {
  const Launch& launch;
  const UpdateRow* rows;
  int64_t num_rows, num_chunks;
  const UpdateConstants<double>* constants;
  const Tables* tally;
};

template <Rule kRule, typename Format, typename Key>
void launch_step(const Step& s, uint64_t infinity) {
  const Tables none{};
  const Tables& t = s.tally == nullptr ? none : *s.tally;
  const kernels::Tally tally{t.layers, t.groups, t.space};
  const unsigned grid = grid_of(s.launch, kernels::kUpdaters<Format, Key>, s.num_chunks);
  GMP_LAUNCH((kernels::update<kRule, Format, Key>), grid, s.launch, s.rows, s.num_rows, s.num_chunks, s.constants,
             tally, infinity);
}

// Key is that of the weights; for those of 16 bits, `wide` says that their float32 copies are ranked.
template <Rule kRule, typename Format, typename Key>
void update_as(const Step& step, Key infinity, bool wide) {
  if constexpr (kRule != Rule::average) {
    if constexpr (sizeof(Key) == 2) {
      if (step.tally != nullptr && wide) return launch_step<kRule, Format, uint32_t>(step, 0x7f800000u);
    }
    if (step.tally != nullptr) return launch_step<kRule, Format, Key>(step, infinity);
  }
  launch_step<kRule, Format, void>(step, 0);
}

template <Rule kRule>
void update_by(const Step& step, DType dtype, bool wide) {
  switch (dtype) {
    case DType::float32:
      return update_as<kRule, kernels::Wide<float>, uint32_t>(step, 0x7f800000u, wide);
    case DType::float64:
      return update_as<kRule, kernels::Wide<double>, uint64_t>(step, 0x7ff0000000000000ull, wide);
    case DType::float16:
      return update_as<kRule, kernels::Float16, uint16_t>(step, 0x7c00, wide);
    case DType::bfloat16:
      return update_as<kRule, kernels::BFloat16, uint16_t>(step, 0x7f80, wide);
  }
}

}  // namespace

void update(const Launch& launch, DType dtype, Rule rule, const UpdateRow* rows, int64_t num_rows, int64_t num_chunks,
            const UpdateConstants<double>* constants, const Tables* tally, DType ranked) {
  prepare(launch);
  const Step step{launch, rows, num_rows, num_chunks, constants, tally};
  const bool wide = ranked != dtype;
  switch (rule) {
    case Rule::sgd:
      return update_by<Rule::sgd>(step, dtype, wide);
    case Rule::adam:
      return update_by<Rule::adam>(step, dtype, wide);
    case Rule::average:
      return update_by<Rule::average>(step, dtype, wide);
  }
}

}  // namespace gmp::cuda
