#include <omp.h>

#include <memory>

#include "kernels.h"
#include "select.h"

namespace gmp::cpu {

int64_t find_match(const LayerView& layer, int64_t begin, int64_t end, const Bracket& bracket, int64_t rank) {
  const Kernels& kernels = kernels_of(layer.dtype);
  while (end - begin > 8) {
    const int64_t middle = begin + ((end - begin) / 2 + 7) / 8 * 8;
    const int64_t lower = kernels.scan(layer, begin, middle, bracket, nullptr).inside;
    if (rank < lower) {
      end = middle;
    } else {
      rank -= lower;
      begin = middle;
    }
  }
  // Fewer than nine weights are left. The shortest prefix with rank + 1 matches ends with the match itself.
  for (int64_t i = begin; i < end; ++i) {
    if (kernels.scan(layer, begin, i + 1, bracket, nullptr).inside > rank) return i;
  }
  return -1;
}

std::vector<Chunk> count(const std::vector<LayerView>& layers, const std::vector<Group*>& groups, int64_t num_bins,
                         std::vector<int64_t>& nonfinite, int num_threads) {
  // All memory is allocated first, because an exception in a thread of a parallel region ends the process.
  std::vector<Chunk> chunks;
  std::vector<Group*> group_of(layers.size());
  bool wants_bins = false;
  int64_t most_bytes = 0;
  for (Group* group : groups) {
    group->counts = {};
    group->first_chunk = chunks.size();
    wants_bins |= group->bins != nullptr;
    for (size_t l = group->first_layer; l < group->first_layer + group->num_layers; ++l) {
      add_chunks(chunks, l, layers[l].n);
      group_of[l] = group;
      most_bytes = std::max(most_bytes, bytes_of(layers[l].dtype));
    }
  }
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  const int num_workers = static_cast<int>(std::clamp<int64_t>(num_chunks / 2, 1, num_threads));
  const int64_t own_bytes = kChunk * most_bytes + kGatherSlackBytes, own_bins = wants_bins ? num_bins : 0;
  const std::unique_ptr<char[]> key_buffers(new char[static_cast<size_t>(num_workers * own_bytes)]);
  std::vector<int64_t> bin_buffers(static_cast<size_t>(num_workers * own_bins));
  active_kernels();  // may throw at its first call

#pragma omp parallel num_threads(num_workers)
  {
    void* const gathered = key_buffers.get() + omp_get_thread_num() * own_bytes;
    int64_t* const bins = bin_buffers.data() + omp_get_thread_num() * own_bins;
    int64_t* target = nullptr;  // whose bins these are
    const auto flush = [&] {
      if (target == nullptr) return;
#pragma omp critical(gmp_kernels_bins)
      for (int64_t b = 0; b < own_bins; ++b) target[b] += bins[b];
      std::fill_n(bins, own_bins, 0);
    };
#pragma omp for schedule(monotonic : dynamic, 4) nowait
    for (int64_t i = 0; i < num_chunks; ++i) {
      Chunk& chunk = chunks[static_cast<size_t>(i)];
      const LayerView& layer = layers[chunk.tensor];
      Group& group = *group_of[chunk.tensor];
      const Bracket bracket = group.bracket;
      const bool gathers = group.capacity > 0 || (group.bins != nullptr && bracket.lo < bracket.hi);
      const BracketCounts counts =
          kernels_of(layer.dtype).scan(layer, chunk.begin, chunk.end, bracket, gathers ? gathered : nullptr);
#pragma omp atomic
      group.counts.below += counts.below;
#pragma omp atomic
      group.counts.pruned += counts.pruned;
#pragma omp atomic capture
      {
        chunk.offset = group.counts.inside;
        group.counts.inside += counts.inside;
      }
      chunk.inside = counts.inside;
      with_dtype(layer.dtype, [&](auto infinity) {
        using Key = decltype(infinity);
        const Key* const keys = static_cast<const Key*>(gathered);
        // Nothing is stored past the capacity; the caller sees that more keys are inside.
        if (chunk.offset + chunk.inside <= group.capacity) {
          std::copy_n(keys, chunk.inside, static_cast<Key*>(group.candidates) + chunk.offset);
        }
        if (group.bins != nullptr) {
          if (target != group.bins) flush();
          target = group.bins;
          if (!gathers) bins[0] += chunk.inside;
          const Key lo = static_cast<Key>(bracket.lo);
          const int shift = shift_of(bracket, num_bins);
          for (int64_t k = 0; gathers && k < chunk.inside; ++k) ++bins[static_cast<Key>(keys[k] - lo) >> shift];
        }
        if (counts.nonfinite) {
          const Bracket beyond{infinity, uint64_t{infinity} + 1};
          int64_t& first = nonfinite[chunk.tensor];
#pragma omp critical(gmp_kernels_nonfinite)
          if (first < 0 || chunk.begin < first) first = find_match(layer, chunk.begin, chunk.end, beyond, 0);
        }
      });
    }
    flush();
  }
  return chunks;
}

}  // namespace gmp::cpu
