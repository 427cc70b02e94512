#include "apply.h"

#include "chunks.h"
#include "kernels.h"

namespace gmp::cpu {

std::pair<std::vector<int64_t>, std::vector<int64_t>> apply(const std::vector<LayerView>& layers,
                                                            const std::vector<uint64_t>& keys,
                                                            const std::vector<int64_t>& tie_indices,
                                                            const std::vector<uint8_t*>& kept, int num_threads) {
  const std::vector<Chunk> chunks = chunks_of(layers);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> before(layers.size()), now(layers.size());
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(monotonic : dynamic, 4) num_threads(num_threads)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& c = chunks[static_cast<size_t>(i)];
    const LayerView& layer = layers[c.tensor];
    const Kernels& kernels = kernels_of(layer.dtype);
    int64_t kept_before = 0;
    if (keys.empty()) {
      kernels.apply(layer, c.begin, c.end, nullptr, 0, layer.n, kept_before);
      continue;
    }
    const size_t l = c.tensor;
    const int64_t kept_now = kernels.apply(layer, c.begin, c.end, kept[l], keys[l], tie_indices[l], kept_before);
#pragma omp atomic
    before[l] += kept_before;
#pragma omp atomic
    now[l] += kept_now;
  }
  return {std::move(before), std::move(now)};
}

}  // namespace gmp::cpu
