#include "ties.h"

#include <algorithm>

#include "chunks.h"
#include "filter.h"
#include "kernels.h"

namespace gmp::cpu {
namespace {

// Weights that one scan looks through for matches; those of a block with any are looked at one by one.
constexpr int64_t kBlock = 128;

// The slots of a layer, through which flat indices go in ascending order.
class Slots {
 public:
  Slots(const int64_t* places, int64_t num_slots, int64_t* counts, int64_t begin)
      : places_(places),
        counts_(counts),
        end_(places[num_slots]),
        slot_(std::max(places, std::upper_bound(places, places + num_slots, begin) - 1)) {}

  // End of the slot in which an index lies; the index itself if it lies in none.
  int64_t end_of(int64_t index) {
    if (index < *places_ || index >= end_) return index;
    while (slot_[1] <= index) ++slot_;
    return slot_[1];
  }

  // Counts matches at an index, unless it lies in no slot.
  void add(int64_t index, int64_t matches) {
    if (matches == 0 || end_of(index) == index) return;
    int64_t& count = counts_[slot_ - places_];
#pragma omp atomic
    count += matches;
  }

 private:
  const int64_t* const places_;
  int64_t* const counts_;
  const int64_t end_;
  const int64_t* slot_;
};

// Weights [begin, end), at the beginning of a mask byte, of a layer whose memory is row-major.
void count_in_order(const LayerView& layer, int64_t begin, int64_t end, const Bracket& key, Slots& slots) {
  const Kernels& kernels = kernels_of(layer.dtype);
  with_matches(layer, layer.mask, key, [&](auto is_match, int64_t, int64_t) {
    while (begin < end) {
      const int64_t until = std::min(slots.end_of(begin) / 8 * 8, end);
      if (until >= begin + kBlock) {
        slots.add(begin, kernels.scan(layer, begin, until, key, nullptr).inside);
        begin = until;
        continue;
      }
      const int64_t next = std::min(begin + kBlock, end);
      int64_t left = kernels.scan(layer, begin, next, key, nullptr).inside;
      for (; left > 0 && begin < next; ++begin) {
        if (!is_match(begin)) continue;
        slots.add(begin, 1);
        --left;
      }
      begin = next;
    }
  });
}

// Weights [begin, end), whole filters.
void count_in_filters(const LayerView& layer, int64_t begin, int64_t end, const Bracket& key, Slots& slots) {
  with_matches(layer, layer.mask, key, [&](auto is_match, int64_t channels, int64_t positions) {
    for (; begin < end; begin += channels * positions) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < positions; ++p)
          slots.add(begin + c * positions + p, is_match(begin + p * channels + c));
      }
    }
  });
}

}  // namespace

void count_slots(const std::vector<LayerView>& layers, const std::vector<uint64_t>& keys, const int64_t* places,
                 int64_t num_slots, int64_t* counts, int num_threads) {
  std::vector<Chunk> chunks;
  for (size_t l = 0; l < layers.size(); ++l) {
    const int64_t* const own = places + static_cast<int64_t>(l) * (num_slots + 1);
    const int64_t filter = layers[l].filter.size();
    const int64_t unit = filter == 1 ? 8 : filter, step = std::max<int64_t>(1, kChunk / unit) * unit;
    const int64_t end = filter == 1 ? own[num_slots] : layers[l].filter.end_of(own[num_slots]);
    for (int64_t begin = own[0] / unit * unit; begin < end; begin += step) {
      chunks.push_back({l, begin, std::min(begin + step, end)});
    }
  }
  const int64_t num_chunks = static_cast<int64_t>(chunks.size());
  active_kernels();  // may throw at its first call
#pragma omp parallel for schedule(dynamic, 4) num_threads(num_threads)
  for (int64_t i = 0; i < num_chunks; ++i) {
    const auto& [l, begin, end, _, offset] = chunks[static_cast<size_t>(i)];
    const int64_t row = static_cast<int64_t>(l);
    Slots slots(places + row * (num_slots + 1), num_slots, counts + row * num_slots, begin);
    const Bracket key{keys[l], keys[l]};
    (layers[l].filter.size() == 1 ? count_in_order : count_in_filters)(layers[l], begin, end, key, slots);
  }
}

}  // namespace gmp::cpu
