#include "apply.h"

#include <utility>

namespace gmp::cpu {
namespace {

// One chunk in which the layer's tie index may fall: before it ties stay, from it on they go. One inside a byte of the
// mask sends the eight weights around it through a copy of their own.
template <typename Key>
ApplyCounts apply_chunk(const Kernels<Key>& kernels, const LayerView& layer, int64_t begin, int64_t end, Key infinity,
                        Key key, int64_t tie_index, uint8_t* kept) {
  ApplyCounts total;
  const auto run = [&](int64_t from, int64_t to, Key range_limit) {
    if (from >= to) return;
    const ApplyCounts counts = kernels.apply(static_cast<Key*>(layer.weights) + from, to - from,
                                             layer.mask == nullptr ? nullptr : layer.mask + from / 8,
                                             kept == nullptr ? nullptr : kept + from / 8, infinity, range_limit);
    total.kept += counts.kept;
    total.kept_before += counts.kept_before;
  };
  const Key limit_after = static_cast<Key>(key + 1);
  const int64_t byte_begin = std::clamp(tie_index / 8 * 8, begin, end);
  run(begin, byte_begin, key);
  if (byte_begin < end && tie_index > byte_begin) {
    const int64_t byte_end = std::min(byte_begin + 8, end);
    Key low[8], high[8];
    uint8_t low_bits = 0, high_bits = 0;
    const size_t bytes = static_cast<size_t>(byte_end - byte_begin) * sizeof(Key);
    Key* weights = static_cast<Key*>(layer.weights) + byte_begin;
    __builtin_memcpy(low, weights, bytes);
    __builtin_memcpy(high, weights, bytes);
    const uint8_t* mask = layer.mask == nullptr ? nullptr : layer.mask + byte_begin / 8;
    const int64_t n = byte_end - byte_begin, low_n = std::min(tie_index - byte_begin, n);
    const ApplyCounts before = kernels.apply(low, n, mask, &low_bits, infinity, key);
    kernels.apply(high, n, mask, &high_bits, infinity, limit_after);
    __builtin_memcpy(low + low_n, high + low_n, static_cast<size_t>(n - low_n) * sizeof(Key));
    __builtin_memcpy(weights, low, bytes);
    const unsigned low_mask = (1u << low_n) - 1;
    const uint8_t bits = static_cast<uint8_t>((low_bits & low_mask) | (high_bits & ~low_mask));
    if (kept != nullptr) kept[byte_begin / 8] = bits;
    total.kept_before += before.kept_before;
    total.kept += __builtin_popcount(bits);
    run(byte_end, end, limit_after);
  } else {
    run(byte_begin, end, limit_after);
  }
  return total;
}

}  // namespace

ApplyPass::ApplyPass(DType dtype, const std::vector<LayerView>& layers, std::vector<uint64_t> keys,
                     std::vector<int64_t> tie_indices, std::vector<uint8_t*> kept)
    : dtype_(dtype),
      layers_(layers),
      keys_(std::move(keys)),
      tie_indices_(std::move(tie_indices)),
      kept_(std::move(kept)),
      chunks_(sizes_of(layers)),
      counts_(layers.size()) {
  active_kernels();  // may throw at its first call
  if (!keys_.empty()) return;
  keys_.resize(layers.size(), 0);
  tie_indices_ = sizes_of(layers);
}

template <typename Key>
void ApplyPass::run_typed(Key infinity, int num_threads) noexcept {
  const Kernels<Key>& kernels = kernels_for<Key>();
#pragma omp parallel for schedule(monotonic : dynamic, 4) num_threads(num_threads)
  for (int64_t i = 0; i < chunks_.size(); ++i) {
    const Chunk chunk = chunks_[i];
    const size_t l = chunk.tensor;
    const ApplyCounts counts =
        apply_chunk<Key>(kernels, layers_[l], chunk.begin, chunk.end, infinity, static_cast<Key>(keys_[l]),
                         tie_indices_[l], kept_.empty() ? nullptr : kept_[l]);
#pragma omp atomic
    counts_[l].kept += counts.kept;
#pragma omp atomic
    counts_[l].kept_before += counts.kept_before;
  }
}

void ApplyPass::run(int num_threads) noexcept {
  with_dtype(dtype_, [&](auto infinity) { run_typed(infinity, num_threads); });
}

}  // namespace gmp::cpu
