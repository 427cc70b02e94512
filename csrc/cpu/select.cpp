// Exact selection by a sampled bracket that is counted, never believed.
//
//   bracket  a few thousand sampled keys, or the caller, give [lo, hi] around the wanted rank
//   count    ONE read of the weights counts the keys below lo and gathers those inside, 1-2 % of them
//   refine   where the counts prove the bracket, the threshold is an order statistic of the gathered
//   ties     the gathered keys, kept per chunk, tell in which chunk the last tie that stays lies
//
// All of it counts in the order of memory. Where that is not row-major, one filter is searched for the flat index.
// Layers with a ranking of their own are made into plain ones piece by piece, at each read (ranked.h).
//
// If the counts do not prove a bracket, the next one is sure to hold. If candidates would not fit the memory limit,
// they are not gathered: the bracket is cut into 2048 bins that are counted, so every further read narrows the keys by
// 11 bits. Only the order in which candidates are stored depends on the number of threads.
//
// Source: Floyd and Rivest, "Expected time bounds for selection", CACM 18(3), 1975; the count as proof and the
// streaming gather follow the practice of GPU top-k.
#include "select.h"

#include <omp.h>

#include <memory>

#include "filter.h"
#include "kernels.h"
#include "ranked.h"
#include "sample.h"

namespace gmp::cpu {
namespace {

constexpr int64_t kBins = 2048;
constexpr int64_t kWaveBytes = 11 << 17;  // candidates of one wave: this plus 3 % of the largest layer
constexpr int64_t kSlack = 64;            // keys for which there is room beyond those expected
constexpr int kMaxSolvers = 4;            // threads with buffers of their own

// Index of the match number `rank` (0-based) among the unpruned keys of weights [begin, end) that are in a bracket; -1
// if there are not that many. `begin` is at the beginning of a mask byte.
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

// Row-major index of the match before which, in row-major order, lie as many matches of its filter as in memory before
// the match at `place`; -1 for -1. `memory` is for a piece of the filter.
int64_t in_row_major(const LayerView& layer, int64_t place, const Bracket& bracket, char* memory) {
  if (layer.filter.size() == 1 || place < 0) return place;
  const int64_t begin = place / layer.filter.size() * layer.filter.size();
  const auto [piece, first, nonfinite] = ranked(layer, begin, begin + layer.filter.size(), memory, true);
  const Kernels& kernels = kernels_of(piece.dtype);
  int64_t rank = kernels.scan(piece, 0, place - first, bracket, nullptr).inside -
                 kernels.scan(piece, 0, begin - first, bracket, nullptr).inside;
  return with_matches(piece, piece.mask, bracket,
                      [&, from = first](auto is_match, int64_t channels, int64_t positions) {
                        for (int64_t c = 0; c < channels; ++c) {
                          for (int64_t p = 0; p < positions; ++p) {
                            if (is_match(begin - from + p * channels + c) && rank-- == 0)
                              return begin + c * positions + p;
                          }
                        }
                        return place;  // the weights have changed meanwhile
                      });
}

// The place of the match number `rank` of a chunk.
int64_t find_match(const LayerView& layer, const Chunk& chunk, const Bracket& bracket, int64_t rank, char* memory) {
  const Piece piece = ranked(layer, chunk.begin, chunk.end, memory);
  const int64_t found = find_match(piece.layer, 0, piece.layer.n, bracket, rank);
  return found < 0 ? found : piece.first + found;
}

// The most memory that a piece of a chunk or of a filter takes.
int64_t memory_for_pieces(const std::vector<LayerView>& layers) {
  int64_t most = 0;
  for (const LayerView& layer : layers) {
    if (!layer.is_plain()) most = std::max(most, piece_bytes(layer, std::max(chunk_of(layer), layer.filter.size())));
  }
  return most;
}

}  // namespace

std::vector<Chunk> count(const std::vector<LayerView>& layers, const std::vector<Group*>& groups, int64_t num_bins,
                         std::vector<int64_t>& nonfinite, int num_threads) {
  // All memory is allocated first, because an exception in a thread of a parallel region ends the process.
  std::vector<Chunk> chunks;
  std::vector<Group*> group_of(layers.size());
  bool wants_bins = false;
  int64_t most_bytes = 0, for_pieces = memory_for_pieces(layers);
  size_t most_chunks = 0;
  for (const Group* group : groups) most_chunks += group->num_layers + static_cast<size_t>(group->n / kChunk);
  chunks.reserve(most_chunks);  // growing would take three times as much
  for (Group* group : groups) {
    group->counts = {};
    group->first_chunk = chunks.size();
    wants_bins |= group->bins != nullptr;
    for (size_t l = group->first_layer; l < group->first_layer + group->num_layers; ++l) {
      add_chunks(chunks, l, layers[l].n, chunk_of(layers[l]));
      group_of[l] = group;
      most_bytes = std::max(most_bytes, bytes_of(layers[l].dtype) * chunk_of(layers[l]));
    }
  }
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  const int num_workers = static_cast<int>(std::clamp<int64_t>(num_chunks / 2, 1, num_threads));
  const int64_t own_bytes = most_bytes + kGatherSlackBytes, own_bins = wants_bins ? num_bins : 0;
  const std::unique_ptr<char[]> key_buffers(new char[static_cast<size_t>(num_workers * own_bytes)]);
  std::vector<int64_t> bin_buffers(static_cast<size_t>(num_workers * own_bins));
  const std::unique_ptr<char[]> piece_buffers(new char[static_cast<size_t>(num_workers * for_pieces)]);
  active_kernels();  // may throw at its first call

#pragma omp parallel num_threads(num_workers)
  {
    void* const gathered = key_buffers.get() + omp_get_thread_num() * own_bytes;
    int64_t* const bins = bin_buffers.data() + omp_get_thread_num() * own_bins;
    char* const memory = piece_buffers.get() + omp_get_thread_num() * for_pieces;
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
      const Piece piece = ranked(layer, chunk.begin, chunk.end, memory);
      const BracketCounts counts =
          kernels_of(layer.dtype).scan(piece.layer, 0, piece.layer.n, bracket, gathers ? gathered : nullptr);
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
          const Key lo = static_cast<Key>(bracket.lo);
          const int shift = shift_of(bracket, num_bins);
          const auto count_in = [&](auto* into) {
            if (!gathers) into[0] = static_cast<std::decay_t<decltype(*into)>>(into[0] + chunk.inside);
            for (int64_t k = 0; gathers && k < chunk.inside; ++k) ++into[static_cast<Key>(keys[k] - lo) >> shift];
          };
          if (group.chunk_bins == nullptr) {
            count_in(bins);
          } else {
            uint16_t* const own = group.chunk_bins + (i - static_cast<int64_t>(group.first_chunk)) * num_bins;
            count_in(own);
            for (int64_t b = 0; b < num_bins; ++b) bins[b] += own[b];
          }
        }
      });
      if (counts.nonfinite || piece.nonfinite) {
        const LayerView source = source_of(layer);
        const int64_t unit = weights_per_unit(layer), begin = chunk.begin * unit;
        const Bracket beyond =
            with_dtype(source.dtype, [](auto infinity) { return Bracket{infinity, uint64_t{infinity} + 1}; });
        int64_t& first = nonfinite[chunk.tensor];
#pragma omp critical(gmp_kernels_nonfinite)
        if (first < 0 || begin < first) {
          // There is none if only the sum of a block has overflowed.
          const int64_t found = find_match(source, begin, chunk.end * unit, beyond, 0);
          if (found >= 0) first = found;
        }
      }
    }
    flush();
  }
  return chunks;
}

namespace {

// Called after a count; returns whether the group is settled. If not, its bracket is set for the next read.
template <typename Key>
bool resolve(const std::vector<LayerView>& layers, Group& group, const std::vector<Chunk>& chunks, Key infinity,
             Key* buffers, char* memory, std::vector<int64_t>& tie_indices) {
  const DType dtype = layers[group.first_layer].dtype;
  const size_t end_layer = group.first_layer + group.num_layers;
  const auto [below, inside, pruned, nonfinite] = group.counts;
  const int64_t wanted = group.num_prune - pruned;
  const Proof proof = prove(wanted, below, inside);
  if (proof == Proof::kNothingWanted) {
    group.bracket = {0, 0};
    group.counts = {0, 0, pruned};
    for (size_t l = group.first_layer; l < end_layer; ++l) tie_indices[l] = layers[l].n;
    return true;
  }
  if (proof != Proof::kHolds) {
    group.bracket = beside(group.bracket, proof, uint64_t{infinity} + 1);
    group.expected_inside = group.n;
    return false;
  }
  if (group.bins != nullptr) {
    int64_t before = below;
    size_t bin = 0;
    while (before + group.bins[bin] < wanted) before += group.bins[bin++];
    group.expected_inside = group.bins[bin];
    group.bracket = bin_of(group.bracket, bin, shift_of(group.bracket, kBins));
    return false;
  }
  Key* const candidates = static_cast<Key*>(group.candidates);
  const bool is_one_key = group.bracket.lo == group.bracket.hi;
  if (!is_one_key) {
    if (inside > group.capacity) {
      group.expected_inside = group.n;
      return false;
    }
    const BracketCounts found = order_statistic(dtype, candidates, inside, wanted - below - 1, group.bracket, buffers,
                                                buffers + kBufferKeys<Key>, kMaxSample<Key>);
    group.counts = {below + found.below, found.inside, pruned};
  }
  int64_t kept = num_ties_kept(group);
  if (kept == 0) return true;
  for (size_t i = group.first_chunk; i < chunks.size(); ++i) {
    const Chunk& chunk = chunks[i];
    if (chunk.tensor < group.first_layer || chunk.tensor >= end_layer) break;  // the weights have changed meanwhile
    int64_t matches = chunk.inside;
    if (!is_one_key) {
      const LayerView own{dtype, candidates + chunk.offset, chunk.inside, nullptr};
      matches = kernels_of(dtype).scan(own, 0, own.n, group.bracket, nullptr).inside;
    }
    int64_t& tie_index = tie_indices[chunk.tensor];
    if (kept < matches) {
      const LayerView& layer = layers[chunk.tensor];
      const int64_t place = find_match(layer, chunk, group.bracket, kept, memory);
      tie_index = in_row_major(layer, place, group.bracket, memory);
      return true;
    }
    kept -= matches;
    tie_index = chunk.end;
  }
  return true;
}

}  // namespace

void select(const std::vector<LayerView>& layers, std::vector<Group>& groups, std::vector<int64_t>& tie_indices,
            std::vector<int64_t>& nonfinite, int num_threads) {
  const int64_t num_groups = static_cast<int64_t>(groups.size());
  int64_t total = 0;
  for (const LayerView& layer : layers) total += layer.n;
  const int num_solvers =
      std::min({threads_for(total, 2 * kChunk, num_threads), kMaxSolvers, static_cast<int>(num_groups)});
  const int64_t for_pieces = memory_for_pieces(layers), own_bytes = 3 * kBufferBytes + for_pieces;
  const std::unique_ptr<char[]> buffers(new char[static_cast<size_t>(num_solvers * own_bytes)]);
  const auto solve = [&](const Group& group, auto work) {
    with_dtype(layers[group.first_layer].dtype, [&](auto infinity) {
      char* const own = buffers.get() + omp_get_thread_num() * own_bytes;
      work(infinity, reinterpret_cast<decltype(infinity)*>(own), own + 3 * kBufferBytes);
    });
  };
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_solvers)
  for (int64_t g = 0; g < num_groups; ++g) {
    Group& group = groups[static_cast<size_t>(g)];
    for (size_t l = 0; l < group.num_layers; ++l) group.n += layers[group.first_layer + l].n;
    group.expected_inside = group.n / 64;
    if (group.bracket.lo <= group.bracket.hi) continue;
    solve(group, [&](auto infinity, auto* own, char*) { guess_bracket(layers, group, infinity, own); });
  }

  int64_t largest = 0;
  for (const LayerView& layer : layers) largest = std::max(largest, layer.n * bytes_of(layer.dtype));
  const int64_t budget = largest * 3 / 100 + kWaveBytes;
  const std::unique_ptr<char[]> memory(new char[static_cast<size_t>(budget)]);
  std::vector<Group*> pending;
  for (Group& group : groups) pending.push_back(&group);
  std::vector<char> settled(groups.size());
  while (!pending.empty()) {
    // As many groups as there is memory for, at least one.
    std::vector<Group*> wave, later;
    int64_t used = 0;
    for (Group* group : pending) {
      const int64_t key_bytes = bytes_of(layers[group->first_layer].dtype);
      const bool is_one_key = group->bracket.lo == group->bracket.hi;
      const bool fits = (group->expected_inside + kSlack) * key_bytes <= budget;
      group->capacity = is_one_key || !fits ? 0 : group->expected_inside + kSlack;
      const int64_t bytes = is_one_key ? 0 : fits ? group->capacity * key_bytes : kBins * int64_t{sizeof(int64_t)};
      if (used + bytes > budget) {
        later.push_back(group);
        continue;
      }
      char* const own = memory.get() + used;
      group->candidates = own;
      group->bins = is_one_key || fits ? nullptr : reinterpret_cast<int64_t*>(own);
      if (group->bins != nullptr) std::fill_n(group->bins, kBins, 0);
      used += (bytes + 63) / 64 * 64;
      wave.push_back(group);
    }
    const std::vector<Chunk> chunks = count(layers, wave, kBins, nonfinite, num_threads);
    const int64_t wave_size = static_cast<int64_t>(wave.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_solvers)
    for (int64_t i = 0; i < wave_size; ++i) {
      Group& group = *wave[static_cast<size_t>(i)];
      solve(group, [&](auto infinity, auto* own, char* pieces) {
        settled[static_cast<size_t>(i)] = resolve(layers, group, chunks, infinity, own, pieces, tie_indices);
      });
    }
    for (size_t i = 0; i < wave.size(); ++i) {
      if (!settled[i]) later.push_back(wave[i]);
    }
    pending = std::move(later);
  }
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerView source = source_of(layers[l]);
    with_dtype(source.dtype, [&](auto infinity) {
      nonfinite[l] = in_row_major(source, nonfinite[l], {infinity, uint64_t{infinity} + 1}, nullptr);
    });
  }
}

}  // namespace gmp::cpu
