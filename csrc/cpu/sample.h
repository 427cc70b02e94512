// A sample of the keys of some layers, to guess a bracket from.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layers.h"
#include "order/magnitude_key.h"

namespace gmp::cpu {

// Whole cache lines at pseudo-random places, one per stride: evenly spread, and in step with no period of the data.
// Writes at most `wanted` ranks to `sample` and returns how many: 0 for a pruned weight, 1 + key for the others. Layers
// get their share by size; a layer smaller than its share is taken whole.
template <typename Key>
int64_t draw_sample(const LayerView* layers, size_t num_layers, int64_t n, int64_t wanted, Key infinity, Key* sample) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Key));
  constexpr int kBatch = 32;
  int64_t size = 0;
  uint64_t random = 0x9e3779b97f4a7c15ull;  // xorshift64
  for (const LayerView* layer = layers; layer != layers + num_layers; ++layer) {
    const Key* const weights = static_cast<const Key*>(layer->weights);
    const auto take = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Key bits;
        __builtin_memcpy(&bits, weights + i, sizeof(Key));
        const bool kept = layer->mask == nullptr || (layer->mask[i / 8] >> (i % 8) & 1);
        sample[size++] = kept ? static_cast<Key>(magnitude_key(bits, infinity) + 1) : Key{0};
      }
    };
    const double fraction = static_cast<double>(layer->n) / static_cast<double>(n);
    const int64_t share = num_layers == 1 ? wanted : static_cast<int64_t>(static_cast<double>(wanted) * fraction);
    if (layer->n <= share) {
      take(0, layer->n);
      continue;
    }
    const int64_t lines = share / kLine;
    const double stride = static_cast<double>(layer->n) / static_cast<double>(std::max<int64_t>(lines, 1));
    // In batches: all lines of one are asked for before the first is read.
    int64_t begins[kBatch];
    for (int64_t line = 0; line < lines;) {
      int batch = 0;
      for (; batch < kBatch && line < lines; ++batch, ++line) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        const double jitter = static_cast<double>(random >> 11) * 0x1p-53 * (stride - static_cast<double>(kLine));
        begins[batch] = static_cast<int64_t>(static_cast<double>(line) * stride + jitter) / kLine * kLine;
        __builtin_prefetch(weights + begins[batch]);
      }
      for (int b = 0; b < batch; ++b) take(begins[b], begins[b] + kLine);
    }
  }
  return size;
}

}  // namespace gmp::cpu
