// Zeroes what lies below the cut and writes the new mask, in one read and as few writes as there are changes.
#pragma once

#include "device.cuh"

namespace gmp::cuda::kernels {

template <typename Key>
__global__ void __launch_bounds__(kThreads, 1)
    apply(LayerRow* layers, int64_t num_layers, int64_t num_chunks, Key infinity) {
  for_each_chunk(layers, num_layers, num_chunks, [&](int64_t l, int64_t, int64_t begin, int64_t end) {
    LayerRow& layer = layers[l];
    const Key threshold = static_cast<Key>(layer.key);
    Key* const weights = pointer<Key>(layer.weights);
    uint8_t* const out = pointer<uint8_t>(layer.out);
    unsigned kept_before = 0, kept = 0;
    for (int64_t i = begin + threadIdx.x * kEach; i < end; i += kTile) {
      const int size = count_from(i, layer.n);
      const unsigned before = load_bits(pointer<const uint8_t>(layer.mask), i, size);
      Key raw[kEach];
      load8(weights + i, size, raw);
      unsigned bits = 0;
      Key changed = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const Key key = magnitude_key(raw[j], infinity);
        const bool stays = (before >> j & 1) && (key > threshold || (key == threshold && i + j < layer.cut));
        bits |= static_cast<unsigned>(stays) << j;
        changed |= stays ? Key(0) : raw[j];
        raw[j] = stays ? raw[j] : Key(0);
      }
      if (changed != 0) store8(weights + i, size, raw);
      if (out != nullptr) store_bits(out, i, bits);
      kept_before += count_bits(before);
      kept += count_bits(bits);
    }
    kept_before = block_sum(kept_before);
    kept = block_sum(kept);
    if (threadIdx.x == 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(&layer.kept_before),
                static_cast<unsigned long long>(kept_before));
      atomicAdd(reinterpret_cast<unsigned long long*>(&layer.kept), static_cast<unsigned long long>(kept));
    }
  });
}

}  // namespace gmp::cuda::kernels
