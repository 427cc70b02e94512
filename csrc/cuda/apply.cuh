// Zeroes what lies below the cut and writes the new mask, in one read and as few writes as there are changes.
#pragma once

#include "device.cuh"

namespace gmp::cuda::kernels {

// Whether a weight stays is one comparison: of ties those of index >= cut need a larger key.
template <typename Key>
struct Cut {
  Key before, after;  // the smallest key that stays, in front of the index and from it on
  int64_t index;

  __device__ Cut(uint64_t threshold, int64_t cut, Key infinity) : before(static_cast<Key>(threshold)), index(cut) {
    // All NaN tie, and nothing lies above them.
    after = threshold > infinity ? static_cast<Key>(~Key{0}) : static_cast<Key>(threshold + 1);
  }
};

struct Kept {
  unsigned before = 0, now = 0;
};

template <bool kWhole, typename Key>
__device__ __forceinline__ void apply_chunk(Key* weights, const uint8_t* mask, const unsigned* touched, uint8_t* out,
                                            int64_t n, int64_t begin, int64_t end, const Cut<Key>& cut, Kept& kept) {
  constexpr int kEights = kWhole && sizeof(Key) < 8 ? 2 : 1;  // two to four loads of 16 bytes are under way
  for (int64_t first = begin + threadIdx.x * kEach; first < end; first += kEights * kTile) {
    Key raw[kEights][kEach];
    unsigned before[kEights];
    bool looks[kEights];  // or nothing changes there
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int64_t i = first + e * kTile;
      const int size = kWhole ? kEach : count_from(i, n);
      before[e] = load_bits(mask, i, size);
      looks[e] = touched == nullptr || (size > 0 && is_touched(touched, i));
      load8<kWhole>(weights + i, looks[e] ? size : 0, raw[e]);
    }
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int64_t i = first + e * kTile;
      const int num_before = count_from(i, cut.index);  // of the eight, in front of the cut
      const Key least = num_before > 0 ? cut.before : cut.after;
      unsigned above = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) above |= static_cast<unsigned>(magnitude_bits(raw[e][j]) >= least) << j;
      if (num_before > 0 && num_before < kEach) {  // the one eight that the cut goes through
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          if (j >= num_before && magnitude_bits(raw[e][j]) < cut.after) above &= ~(1u << j);
        }
      }
      const unsigned bits = looks[e] ? before[e] & above : before[e];
      Key changed = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        changed |= bits >> j & 1 ? Key(0) : raw[e][j];
        raw[e][j] = bits >> j & 1 ? raw[e][j] : Key(0);
      }
      if (changed != 0) store8<kWhole>(weights + i, kWhole ? kEach : count_from(i, n), raw[e]);
      if (out != nullptr) store_bits(out, i, bits);
      kept.before += count_bits(before[e]);
      kept.now += count_bits(bits);
    }
  }
}

// `out` says where the new bits of each layer go, if they go anywhere. Nothing is written if *stop is set.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders<Key>)
    apply(LayerRow* layers, int64_t num_layers, int64_t num_chunks, const GroupRow* groups, const uint64_t* out,
          const int64_t* stop, Key infinity) {
  if (stop != nullptr && *stop != 0) return;
  for_each_chunk(layers, num_layers, num_chunks, [&](int64_t l, int64_t, int64_t begin, int64_t end) {
    LayerRow& layer = layers[l];
    const Cut<Key> cut(groups == nullptr ? 0 : groups[layer.group].key, layer.cut, infinity);
    Key* const weights = pointer<Key>(layer.weights);
    const uint8_t* const mask = pointer<const uint8_t>(layer.mask);
    const unsigned* const touched = pointer<const unsigned>(layer.touched);
    uint8_t* const bits = out == nullptr ? nullptr : pointer<uint8_t>(out[l]);
    Kept kept;
    if (is_whole(weights, begin, end)) {
      apply_chunk<true>(weights, mask, touched, bits, layer.n, begin, end, cut, kept);
    } else {
      apply_chunk<false>(weights, mask, touched, bits, layer.n, begin, end, cut, kept);
    }
    if (bits == nullptr) return;
    const unsigned before = block_sum(kept.before), now = block_sum(kept.now);
    if (threadIdx.x == 0) {
      atomicAdd(counter_at(&layer.kept_before), static_cast<unsigned long long>(before));
      atomicAdd(counter_at(&layer.kept), static_cast<unsigned long long>(now));
    }
  });
}

}  // namespace gmp::cuda::kernels
