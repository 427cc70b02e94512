#include "ties.h"

#include <algorithm>

#include "chunks.h"
#include "kernels.h"

namespace gmp::cpu {
namespace {

// Returns the count before.
int64_t add(int64_t& count, int64_t matches) {
  int64_t before;
#pragma omp atomic capture
  {
    before = count;
    count += matches;
  }
  return before;
}

// Weights [begin, end) in the order of memory, at most kChunk of them, from the beginning of a mask byte.
void count_chunk(const TieSearch& search, int64_t begin, int64_t end, int64_t num_slots, int64_t* counts,
                 int64_t* indices, int64_t capacity) {
  const LayerView& layer = search.layer;
  const Kernels& kernels = kernels_of(layer.dtype);
  const Bracket key{search.key, search.key};
  // All flat indices of these weights lie between these two.
  const int64_t lowest = begin / layer.filter.size() * layer.filter.size(), highest = layer.filter.end_of(end);
  const bool is_before = search.first <= lowest && highest <= search.begin;
  if (is_before || (search.end <= lowest && highest <= search.last)) {
    add(counts[is_before ? 0 : num_slots + 1], kernels.scan(layer, begin, end, key, nullptr).inside);
    return;
  }
  uint16_t places[kChunk];
  const int64_t num_places = kernels.find(layer, begin, end, search.key, places);
  for (int64_t i = 0; i < num_places; ++i) {
    const int64_t place = begin + places[i], filter = place / layer.filter.size() * layer.filter.size();
    const int64_t index = filter + layer.filter.in_row_major(place - filter);
    if (index < search.first || index >= search.last) continue;
    if (index < search.begin || index >= search.end) {
      add(counts[index < search.begin ? 0 : num_slots + 1], 1);
      continue;
    }
    const int64_t offset = search.region->in_whole(index) - search.start;
    const int64_t before = add(counts[1 + (offset >> search.shift)], 1);
    if (before < capacity) indices[before] = offset;
  }
}

}  // namespace

void count_slots(const std::vector<TieSearch>& searches, int64_t num_slots, int64_t* counts, int64_t* indices,
                 int64_t capacity, int num_threads) {
  std::vector<Chunk> chunks;
  for (size_t s = 0; s < searches.size(); ++s) {
    const auto& [layer, region, key, first, begin, end, last, start, shift] = searches[s];
    const int64_t size = layer.filter.size(), until = first < last ? layer.filter.end_of(last) : first;
    for (int64_t i = first / size * size / 8 * 8; i < until; i += kChunk) {
      chunks.push_back({s, i, std::min(i + kChunk, until)});
    }
  }
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const Chunk& chunk = chunks[static_cast<size_t>(i)];
    const auto s = static_cast<int64_t>(chunk.tensor);
    count_chunk(searches[chunk.tensor], chunk.begin, chunk.end, num_slots, counts + s * (num_slots + 2),
                indices + s * capacity, capacity);
  }
}

}  // namespace gmp::cpu
