// Zeroes what lies below the cut and writes the new mask, in one read and as few writes as there are changes.
#pragma once

#include "device.cuh"

namespace gmp::cuda::kernels {

// Whether a weight stays is one comparison: of ties those of index >= cut need a larger key.
template <typename Key>
struct Cut {
  Key before, after;  // the smallest key that stays, in front of the index and from it on

  __device__ Cut(uint64_t threshold, Key infinity) : before(static_cast<Key>(threshold)) {
    // All NaN tie, and nothing lies above them.
    after = threshold > infinity ? static_cast<Key>(~Key{0}) : static_cast<Key>(threshold + 1);
  }
};

struct Kept {
  unsigned before = 0, now = 0;
};

// `cut` is an index in the chunk here. `touched`: see count_chunk; null where everything has to be looked at.
template <bool kWhole, typename Key>
__device__ __forceinline__ void apply_chunk(Key* weights, const uint8_t* mask, const unsigned* touched, uint8_t* out,
                                            int size, const Cut<Key>& cut, int cut_index, Kept& kept) {
  constexpr int kEights = kWhole && sizeof(Key) < 8 ? 8 / sizeof(Key) : 1;  // four loads of 16 bytes are under way
  for (int first = static_cast<int>(threadIdx.x) * kEach; first < size; first += kEights * static_cast<int>(kTile)) {
    Key raw[kEights][kEach] = {};
    unsigned before[kEights];
    bool looks[kEights];  // or nothing changes there
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int i = first + e * static_cast<int>(kTile), there = kWhole ? kEach : count_from(i, size);
      before[e] = load_bits(mask, i, there);
      looks[e] = touched == nullptr || is_touched(touched, i);
      load8<kWhole>(weights + i, looks[e] ? there : 0, raw[e]);
    }
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int i = first + e * static_cast<int>(kTile);
      const int num_before = count_from(i, cut_index);  // of the eight, in front of the cut
      const Key least = num_before > 0 ? cut.before : cut.after;
      unsigned above = looks[e] ? 0 : 0xff;
#pragma unroll
      for (int j = 0; j < kEach; ++j) above |= static_cast<unsigned>(magnitude_bits(raw[e][j]) >= least) << j;
      if (looks[e] && num_before > 0 && num_before < kEach) {  // the one eight that the cut goes through
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (j >= num_before && magnitude_bits(raw[e][j]) < cut.after) above &= ~(1u << j);
        }
      }
      const unsigned bits = before[e] & above;
      Key changed = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        changed |= bits >> j & 1 ? Key(0) : raw[e][j];
        raw[e][j] = bits >> j & 1 ? raw[e][j] : Key(0);
      }
      if (changed != 0) store8<kWhole>(weights + i, kWhole ? kEach : count_from(i, size), raw[e]);
      if (out != nullptr && (looks[e] || out != mask)) store_bits(out, i, bits);
      kept.before += count_bits(before[e]);
      kept.now += count_bits(bits);
    }
  }
}

// `out` says where the new bits of each layer go, if they go anywhere. Nothing is written if *stop is set.
template <typename Key>
__global__ void GMP_REGISTERS((sizeof(Key) == 8   ? 64
                               : sizeof(Key) == 4 ? 72
                                                  : 80),
                              (sizeof(Key) == 8 ? 96 : 80))
    apply(LayerRow* layers, int64_t num_layers, int64_t num_chunks, const GroupRow* groups, const uint64_t* out,
          const int64_t* stop, Key infinity) {
  if (stop != nullptr && *stop != 0) return;
  for_each_run(layers, num_layers, num_chunks, [&](int l, int first, int last) {
    LayerRow& layer = layers[l];
    const Cut<Key> cut(groups == nullptr ? 0 : groups[layer.group].key, infinity);
    const int64_t index = layer.cut, n = layer.n;
    const bool has_mask = layer.mask != 0, has_out = out != nullptr;
    Kept kept;
    for (int chunk = first; chunk < last; ++chunk) {
      const int64_t begin = (chunk - layer.first_chunk) * kChunk;
      Key* const weights = pointer<Key>(layer.weights) + begin;
      const uint8_t* const mask = has_mask ? pointer<const uint8_t>(layer.mask) + begin / 8 : nullptr;
      const unsigned* const touched =
          layer.touched == 0 ? nullptr : pointer<const unsigned>(layer.touched) + begin / kTouchedBy;
      uint8_t* const bits = has_out ? pointer<uint8_t>(out[l]) + begin / 8 : nullptr;
      const int size = size_of_chunk(n, begin);
      const int cut_index = static_cast<int>(index < begin ? 0 : index - begin < kChunk ? index - begin : kChunk);
      if (size == kChunk && is_aligned(weights)) {
        apply_chunk<true>(weights, mask, touched, bits, size, cut, cut_index, kept);
      } else {
        apply_chunk<false>(weights, mask, touched, bits, size, cut, cut_index, kept);
      }
    }
    if (!has_out) return;
    const unsigned before = block_sum(kept.before), now = block_sum(kept.now);
    if (threadIdx.x == 0) {
      atomicAdd(counter_at(&layer.kept_before), static_cast<unsigned long long>(before));
      atomicAdd(counter_at(&layer.kept), static_cast<unsigned long long>(now));
    }
  });
}

}  // namespace gmp::cuda::kernels
