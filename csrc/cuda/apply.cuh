// Zeroes the weights below the cut and writes the new mask, in one read, writing only where something changes.
#pragma once

#include "device.cuh"

namespace gmp::cuda::kernels {

// A single comparison decides whether a weight stays: from the cut on, the smallest key that stays is one larger.
template <typename Key>
struct Cut {
  Key before, after;                       // the smallest key that stays, before the index and from it on
  unsigned kept_before = 0, kept_now = 0;  // numbers of weights, among those that this thread has read

  __device__ Cut(uint64_t threshold, Key infinity) : before(static_cast<Key>(threshold)) {
    // All NaN tie, and no key lies above them.
    after = threshold > infinity ? static_cast<Key>(~Key{0}) : static_cast<Key>(threshold + 1);
  }
};

// Zeroes those of eight weights whose bit is 0; returns whether any has changed.
template <typename Key>
__device__ __forceinline__ bool zero_eight(Key (&raw)[kEach], unsigned bits) {
  Key changed = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    changed |= bits >> j & 1 ? Key(0) : raw[j];
    raw[j] = bits >> j & 1 ? raw[j] : Key(0);
  }
  return changed != 0;
}

// Zeroes the pruned ones of eight weights, of which `num_before` are before the cut. Takes their old bits, leaves the
// new ones, and returns whether any weight has changed.
template <typename Key>
__device__ __forceinline__ bool prune_eight(Key (&raw)[kEach], unsigned& bits, const Cut<Key>& cut, int num_before) {
  const Key least = num_before > 0 ? cut.before : cut.after;
  unsigned above = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) above |= static_cast<unsigned>(magnitude_bits(raw[j]) >= least) << j;
  if (num_before > 0 && num_before < kEach) {  // the cut lies within this eight
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (j >= num_before && magnitude_bits(raw[j]) < cut.after) above &= ~(1u << j);
    }
  }
  bits &= above;
  return zero_eight(raw, bits);
}

// All of a chunk. `cut_index` is an index in the chunk.
template <bool kWhole, typename Key>
__device__ __forceinline__ void apply_chunk(Key* weights, const uint8_t* mask, uint8_t* out, int size, Cut<Key>& cut,
                                            int cut_index) {
  for_each_eight<kWhole>(weights, mask, size, [&](int i, Key(&raw)[kEach], unsigned bits) {
    cut.kept_before += __popc(bits);
    const bool changed = prune_eight(raw, bits, cut, count_from(i, cut_index));
    if (changed) store8<kWhole>(weights + i, kWhole ? kEach : count_from(i, size), raw);
    if (out != nullptr) store_bits(out, i, bits);
    cut.kept_now += __popc(bits);
  });
}

// Number of chunks whose changing eights are collected together, so that there is work for all threads.
inline constexpr int kTogether = 4;

// Does the eights of `num_chunks` whole chunks that are marked in `touched` (see count_strip); the bits are written
// in place. `places` is shared by the block.
template <typename Key>
__device__ __forceinline__ void apply_touched(Key* weights, uint8_t* mask, const unsigned* touched, int num_chunks,
                                              uint16_t* places, Cut<Key>& cut, int64_t cut_index) {
  constexpr int kWords = kChunk / kTouchedBy;  // of flags, per chunk
  constexpr int kAtOnce = 8 / sizeof(Key);
  static_assert(kTogether * kWords == kThreads && kTogether * kChunk / kEach <= 1 << 16);
  const bool is_one = threadIdx.x < static_cast<unsigned>(num_chunks * kWords);
  unsigned flags = is_one ? load1(touched + threadIdx.x) : 0;
  unsigned here = 0;  // kept weights, of the 256 whose flags these are
  if (is_one) {
#pragma unroll
    for (unsigned v = 0; v < kTouchedBy / 8 / sizeof(uint4); ++v) {
      here += count_bits(mask + threadIdx.x * (kTouchedBy / 8), v);
    }
  }
  cut.kept_before += here;
  cut.kept_now += here;
  int total;
  int place = block_scan(__popc(flags), total);
  for (; flags != 0; flags &= flags - 1) {
    places[place++] = static_cast<uint16_t>(threadIdx.x * kWarpSize + (__ffs(flags) - 1));
  }
  __syncthreads();  // all places are written, and all of the mask has been read
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < total; first += kAtOnce * static_cast<int>(kThreads)) {
    Key raw[kAtOnce][kEach];
    unsigned bits[kAtOnce];
    int at[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int k = first + u * static_cast<int>(kThreads);
      at[u] = k < total ? places[k] * kEach : -1;
      if (at[u] < 0) continue;
      load8<true>(weights + at[u], kEach, raw[u]);
      bits[u] = load_bits(mask, at[u], kEach);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (at[u] < 0) continue;
      const unsigned before = bits[u];
      const bool changed = prune_eight(raw[u], bits[u], cut, count_from(at[u], cut_index));
      if (changed) store8<true>(weights + at[u], kEach, raw[u]);
      if (bits[u] != before) store_bits(mask, at[u], bits[u]);
      cut.kept_now -= __popc(before ^ bits[u]);
    }
  }
  __syncthreads();  // the places are written again
}

template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders) apply(Tables tables, Key infinity) {
  __shared__ uint16_t places[kTogether * kChunk / kEach];
  if (tables.finite && *pointer<const int64_t>(tables.nonfinite) != 0) return;
  LayerRow* const layers = pointer<LayerRow>(tables.layers);
  const GroupRow* const groups = pointer<const GroupRow>(tables.groups);
  const uint64_t* const out = pointer<const uint64_t>(tables.out);
  for_each_run(layers, tables.num_layers, tables.num_chunks, [&](int l, int first, int last) {
    LayerRow& layer = layers[l];
    Cut<Key> cut(groups[layer.group].key, infinity);
    const bool has_mask = layer.mask != 0, has_out = tables.out != 0;
    const bool has_flags = layer.touched != 0 && has_out && out[l] == layer.mask &&
                           is_aligned(pointer<const Key>(layer.weights)) &&
                           is_aligned(pointer<const uint8_t>(layer.mask));
    for (int chunk = first; chunk < last;) {
      const int64_t begin = (chunk - layer.first_chunk) * kChunk;
      Key* const weights = pointer<Key>(layer.weights) + begin;
      const uint8_t* const mask = has_mask ? pointer<const uint8_t>(layer.mask) + begin / 8 : nullptr;
      uint8_t* const bits = has_out ? pointer<uint8_t>(out[l]) + begin / 8 : nullptr;
      const int64_t n = layer.n, index = layer.cut;
      if (has_flags && n - begin >= kChunk) {
        const int whole = static_cast<int>((n - begin) / kChunk < kTogether ? (n - begin) / kChunk : kTogether);
        const int count = whole < last - chunk ? whole : last - chunk;
        apply_touched(weights, bits, pointer<const unsigned>(tables.buffer + layer.touched) + begin / kTouchedBy, count,
                      places, cut, index - begin);
        chunk += count;
        continue;
      }
      const int size = size_of_chunk(n, begin);
      const int cut_index = static_cast<int>(index < begin ? 0 : index - begin < kChunk ? index - begin : kChunk);
      if (size == kChunk && is_aligned(weights)) {
        apply_chunk<true>(weights, mask, bits, size, cut, cut_index);
      } else {
        apply_chunk<false>(weights, mask, bits, size, cut, cut_index);
      }
      ++chunk;
    }
    if (!has_out) return;
    const unsigned before = block_sum(cut.kept_before), now = block_sum(cut.kept_now);
    if (threadIdx.x == 0) {
      atomicAdd(counter_at(&layer.kept_before), static_cast<unsigned long long>(before));
      atomicAdd(counter_at(&layer.kept), static_cast<unsigned long long>(now));
    }
  });
}

}  // namespace gmp::cuda::kernels
