// The bracket estimated from a sample of the keys of a group.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "order/magnitude_key.h"
#include "order_statistic.h"
#include "search/sample.h"
#include "select.h"

namespace gmp::cpu {

constexpr double kSigmas = 4.0;            // half width of the bracket: it fails once in 10^4 selections
constexpr int64_t kSampleBytes = 1 << 18;  // a larger sample costs more than the candidates it saves

template <typename Key>
constexpr int64_t kMaxSample = kSampleBytes / static_cast<int64_t>(sizeof(Key));

// Three buffers in a row, in which a bracket is estimated, or a threshold is found among candidates.
constexpr int64_t kBufferBytes = kSampleBytes + kGatherSlackBytes;
template <typename Key>
constexpr int64_t kBufferKeys = kBufferBytes / static_cast<int64_t>(sizeof(Key));

constexpr int64_t kMostInGroups = 32;  // larger groups are rows, of which few weights are protected

inline bool is_sampled_in_runs(const LayerView& layer) {
  const Pattern& pattern = layer.ranking.pattern;
  return pattern.kind == kBlocks || (pattern.kind == kGroups && pattern.of() <= kMostInGroups);
}

// Like draw_sample for one layer that is ranked by groups or blocks: runs of neighbouring ones, at pseudo-random
// places.
template <typename Key>
BracketCounts draw_runs(const LayerView& layer, int64_t share, const Bracket& all, Key* keys) {
  constexpr int64_t kRun = 16;  // groups or blocks
  const Pattern& pattern = layer.ranking.pattern;
  const bool is_groups = pattern.kind == kGroups;
  const int64_t of = is_groups ? pattern.of() : 1, num_units = layer.n / of;
  const int64_t runs = num_units < kRun ? 0 : share / (kRun * of);
  if (runs == 0) return {};
  uint8_t mask[kMaxSample<Key> / 8] = {}, eligible[kMaxSample<Key> / 8];
  const bool is_masked = layer.mask != nullptr;
  const double stride = static_cast<double>(num_units - kRun) / static_cast<double>(runs);
  uint64_t random = 0x9e3779b97f4a7c15ull;  // xorshift64
  for (int64_t run = 0; run < runs; ++run) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    const double at = static_cast<double>(run) + static_cast<double>(random >> 11) * 0x1p-53;
    const int64_t begin = static_cast<int64_t>(at * stride);
    if (!is_groups) {
      kernels_of(layer.ranking.source_dtype)
          .score(layer, begin, begin + kRun, keys + run * kRun, mask + run * kRun / 8);
      continue;
    }
    for (int64_t g = begin, to = run * kRun * of; g < begin + kRun; ++g) {
      const int64_t first = g / pattern.stride() * pattern.stride() * of + g % pattern.stride();
      for (int64_t j = 0; j < of; ++j, ++to) {
        const int64_t from = first + j * pattern.stride();
        __builtin_memcpy(keys + to, static_cast<const Key*>(layer.weights) + from, sizeof(Key));
        const int bit = is_masked ? layer.mask[from / 8] >> (from % 8) & 1 : 0;
        mask[to / 8] = static_cast<uint8_t>(mask[to / 8] | bit << (to % 8));
      }
    }
  }
  LayerView drawn{layer.dtype, keys, runs * kRun * of, is_masked ? mask : nullptr};
  if (is_groups) {
    drawn.ranking.pattern = {kGroups, pattern.keep(), of, 1};
    kernels_of(layer.dtype).protect(drawn, eligible);
    drawn.ranking = {};
    drawn.mask = eligible;
  }
  return kernels_of(layer.dtype).scan(drawn, 0, drawn.n, all, keys);
}

// Whole cache lines at pseudo-random places, one per stride: evenly spread, but not in step with any period of the
// data. Reads at most `wanted` weights, writes the keys of the unpruned ones to `sample`, and counts these as inside.
// Layers get their share by size; a layer smaller than its share is taken whole.
template <typename Key>
BracketCounts draw_sample(const std::vector<LayerView>& layers, const Group& group, int64_t wanted, const Bracket& all,
                          Key* sample) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Key));
  constexpr int kBatch = 32;
  uint8_t mask[kMaxSample<Key> / 8];  // of the lines
  BracketCounts drawn;
  uint64_t random = 0x9e3779b97f4a7c15ull;  // xorshift64
  for (size_t l = group.first_layer; l < group.first_layer + group.num_layers; ++l) {
    const LayerView& layer = layers[l];
    Key* const keys = sample + drawn.inside;
    const double fraction = static_cast<double>(layer.n) / static_cast<double>(group.n);
    const int64_t share = group.num_layers == 1 ? wanted : static_cast<int64_t>(static_cast<double>(wanted) * fraction);
    if (is_sampled_in_runs(layer)) {
      const BracketCounts counts = draw_runs(layer, share, all, keys);
      drawn.inside += counts.inside;
      drawn.pruned += counts.pruned;
      continue;
    }
    const int64_t lines = layer.n <= share ? 0 : share / kLine;
    const double stride = static_cast<double>(layer.n) / static_cast<double>(std::max<int64_t>(lines, 1));
    // In batches, whose lines are all prefetched before the first is read.
    const Key* begins[kBatch];
    for (int64_t line = 0; line < lines;) {
      const int64_t first = line;
      for (; line < std::min(first + kBatch, lines); ++line) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        const double jitter = static_cast<double>(random >> 11) * 0x1p-53 * (stride - static_cast<double>(kLine));
        const int64_t begin = static_cast<int64_t>(static_cast<double>(line) * stride + jitter) / kLine * kLine;
        begins[line - first] = static_cast<const Key*>(layer.weights) + begin;
        __builtin_prefetch(begins[line - first]);
        if (layer.mask != nullptr) __builtin_memcpy(mask + line * kLine / 8, layer.mask + begin / 8, kLine / 8);
      }
      for (int64_t i = first; i < line; ++i) __builtin_memcpy(keys + i * kLine, begins[i - first], 64);
    }
    const LayerView copied{layer.dtype, keys, lines * kLine, layer.mask == nullptr ? nullptr : mask};
    const LayerView& taken = layer.n <= share ? layer : copied;
    const BracketCounts counts = kernels_of(layer.dtype).scan(taken, 0, taken.n, all, keys);
    drawn.inside += counts.inside;
    drawn.pruned += counts.pruned;
  }
  return drawn;
}

// Sets the bracket of a group, and how many keys should be inside.
template <typename Key>
void guess_bracket(const std::vector<LayerView>& layers, Group& group, Key infinity, Key* buffers) {
  Key* const sample = buffers;
  Key* const near_keys = buffers + kBufferKeys<Key>;
  Key* const spare = near_keys + kBufferKeys<Key>;
  const DType dtype = layers[group.first_layer].dtype;
  const Kernels& kernels = kernels_of(dtype);
  const Bracket all{0, uint64_t{infinity} + 1};
  group.bracket = all;
  group.expected_inside = group.n;
  // n^(2/3) balances the two costs: the sample grows with it, the candidates shrink with its square root.
  const double root = std::cbrt(static_cast<double>(group.n));
  const int64_t wanted = std::clamp<int64_t>(static_cast<int64_t>(root * root), 1024, kMaxSample<Key>);
  if (wanted >= group.n) return;  // all weights would be the sample
  const auto [_, n, pruned, nonfinite] = draw_sample(layers, group, wanted, all, sample);
  if (n == 0) return;  // many tiny layers, whose shares are less than a line; or all weights are pruned
  // Among the sampled weights the pruned ones come first.
  const double size = static_cast<double>(n + pruned);
  // The sample of a row shows nothing of what is protected in it.
  int64_t protected_unseen = 0;
  for (size_t l = group.first_layer; l < group.first_layer + group.num_layers; ++l) {
    const Pattern& pattern = layers[l].ranking.pattern;
    const bool is_seen = pattern.kind != kGroups || is_sampled_in_runs(layers[l]);
    if (!is_seen) protected_unseen += layers[l].n / pattern.of() * pattern.keep();
  }
  const double share = static_cast<double>(group.num_prune - protected_unseen) / static_cast<double>(group.n);
  const double rank = share * size, half = rank_margin(rank, share, kSigmas);
  const int64_t low = static_cast<int64_t>(std::floor(rank - half)) - pruned;
  const int64_t high = static_cast<int64_t>(std::ceil(rank + half)) - pruned;

  // Take the keys around both ranks, estimated from a small sample of the sample. If that misses, take all keys.
  constexpr int64_t kSmall = 1024, kMargin = 96;  // six standard deviations of a rank among 1024
  Bracket near = all;
  if (n >= 16 * kSmall) {
    Key small[kSmall];
    for (int64_t i = 0; i < kSmall; ++i) small[i] = sample[i * n / kSmall];
    std::sort(small, small + kSmall);
    const int64_t first = low * kSmall / n - kMargin, last = high * kSmall / n + kMargin;
    if (first >= 0) near.lo = small[std::min(first, kSmall - 1)];
    if (last < kSmall) near.hi = small[std::max<int64_t>(last, 0)];
  }
  const LayerView sampled{dtype, sample, n, nullptr};
  BracketCounts counts = kernels.scan(sampled, 0, n, near, near_keys);
  const bool holds =
      counts.below <= std::max<int64_t>(low, 0) && std::clamp<int64_t>(high, 0, n - 1) < counts.below + counts.inside;
  if (!holds) {
    near = all;
    counts = kernels.scan(sampled, 0, n, near, near_keys);
  }
  const auto key_at = [&](int64_t r) {
    Bracket key = near;
    order_statistic(dtype, near_keys, counts.inside, r - counts.below, key, sample, spare, kMaxSample<Key>);
    return key.lo;
  };
  group.bracket = {low <= 0 ? 0 : key_at(low), high < 0 ? 0 : high >= n ? all.hi : key_at(high)};
  const LayerView kept{dtype, near_keys, counts.inside, nullptr};
  const double inside = static_cast<double>(kernels.scan(kept, 0, kept.n, group.bracket, nullptr).inside);
  group.expected_inside = static_cast<int64_t>(highest_count(inside, kSigmas) / size * static_cast<double>(group.n));
}

}  // namespace gmp::cpu
