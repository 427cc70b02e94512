#include "apply.h"

#include "chunks.h"
#include "filter.h"
#include "kernels.h"

namespace gmp::cpu {
namespace {

// Zeroes the weights with this key from a row-major index on, up to the end of its filter, and clears their bits.
// Returns how many bits were 1.
int64_t prune_to_end_of_filter(const LayerView& layer, uint8_t* kept, uint64_t key, int64_t tie_index) {
  const int64_t begin = layer.filter.end_of(tie_index) - layer.filter.size();
  const auto item_size = static_cast<size_t>(bytes_of(layer.dtype));
  return with_matches(layer, kept, {key, key}, [&](auto is_match, int64_t channels, int64_t positions) {
    int64_t pruned = 0;
    for (int64_t p = 0, place = begin; p < positions; ++p) {
      for (int64_t c = 0; c < channels; ++c, ++place) {
        if (!is_match(place) || begin + c * positions + p < tie_index) continue;
        std::memset(static_cast<char*>(layer.weights) + static_cast<size_t>(place) * item_size, 0, item_size);
        kept[place / 8] = static_cast<uint8_t>(kept[place / 8] & ~(1u << (place % 8)));
        ++pruned;
      }
    }
    return pruned;
  });
}

}  // namespace

std::pair<std::vector<int64_t>, std::vector<int64_t>> apply(const std::vector<LayerView>& layers,
                                                            const std::vector<uint64_t>& keys,
                                                            const std::vector<int64_t>& tie_indices,
                                                            const std::vector<uint8_t*>& kept, int num_threads) {
  const std::vector<Chunk> chunks = chunks_of(layers);
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  std::vector<int64_t> before(layers.size()), now(layers.size());
  std::vector<size_t> divided;  // layers with a filter of which only some ties stay
  for (size_t l = 0; l < tie_indices.size(); ++l) {
    if (layers[l].filter.end_of(tie_indices[l]) != tie_indices[l]) divided.push_back(l);
  }
  const int64_t num_divided = static_cast<int64_t>(divided.size());
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(monotonic : dynamic, 4) num_threads(threads_for(num_chunks, 4, num_threads))
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
    // A filter in which memory has an order of its own keeps all ties at first.
    const int64_t tie_index = layer.filter.end_of(tie_indices[l]);
    const int64_t kept_now = kernels.apply(layer, c.begin, c.end, kept[l], keys[l], tie_index, kept_before);
#pragma omp atomic
    before[l] += kept_before;
#pragma omp atomic
    now[l] += kept_now;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_divided > 1)
  for (int64_t i = 0; i < num_divided; ++i) {
    const size_t l = divided[static_cast<size_t>(i)];
    now[l] -= prune_to_end_of_filter(layers[l], kept[l], keys[l], tie_indices[l]);
  }
  return {std::move(before), std::move(now)};
}

}  // namespace gmp::cpu
