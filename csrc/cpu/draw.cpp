#include "draw.h"

#include <stdexcept>

#include "sample.h"

namespace gmp::cpu {

std::vector<std::pair<int64_t, int64_t>> draw(const std::vector<LayerView>& layers,
                                              const std::vector<std::tuple<size_t, size_t, int64_t>>& groups,
                                              void* keys, int64_t row_size, int num_threads) {
  const int64_t num_groups = static_cast<int64_t>(groups.size());
  int64_t key_bytes = 0;
  for (const auto& [first, size, wanted] : groups) {
    if (size < 1 || first >= layers.size() || size > layers.size() - first || wanted < 1) {
      throw std::invalid_argument("a sample needs layers, and a number of weights");
    }
    if (key_bytes == 0) key_bytes = bytes_of(layers[first].dtype);
    for (size_t l = first; l < first + size; ++l) {
      if (bytes_of(layers[l].dtype) != key_bytes) throw std::invalid_argument("samples need layers of one dtype");
    }
    if (wanted > kSampleBytes / key_bytes || row_size < wanted + kGatherSlackBytes / key_bytes) {
      throw std::invalid_argument("a sample does not fit its row");
    }
  }
  std::vector<std::pair<int64_t, int64_t>> result(groups.size());
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads)
  for (int64_t i = 0; i < num_groups; ++i) {
    const auto [first, size, wanted] = groups[static_cast<size_t>(i)];
    Group group{first, size, 0, {1, 0}};
    for (size_t l = first; l < first + size; ++l) group.n += layers[l].n;
    with_dtype(layers[first].dtype, [&, wanted = wanted](auto infinity) {
      using Key = decltype(infinity);
      Key* const row = static_cast<Key*>(keys) + i * row_size;
      const BracketCounts counts = draw_sample(layers, group, wanted, Bracket{0, uint64_t{infinity} + 1}, row);
      std::fill(row + counts.inside, row + row_size, static_cast<Key>(infinity + 1));
      result[static_cast<size_t>(i)] = {counts.inside, counts.pruned};
    });
  }
  return result;
}

}  // namespace gmp::cpu
