// Counts of ties, as Python asks for them.
#pragma once

#include <algorithm>
#include <array>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "cpu/ties.h"

namespace gmp {

// length of the whole, offset and size of each dimension of a region
using RegionRow = std::vector<std::tuple<int64_t, int64_t, int64_t>>;
// position of the layer, its key, flat indices of it (first, begin, end, last), where the slots start, their shift, and
// the position of its region: see cpu/ties.h
using TieRow = std::tuple<size_t, uint64_t, std::array<int64_t, 4>, int64_t, int, size_t>;

// counts: a row of num_slots + 2 zeros for each row of ties; indices: none, or a row of `capacity` for each.
inline void count_slots(const std::vector<cpu::LayerView>& layers, const std::vector<TieRow>& ties,
                        const std::vector<RegionRow>& regions, const arrays::Array& counts, int64_t num_slots,
                        const arrays::Array& indices, int64_t capacity, int num_threads) {
  arrays::check_threads(num_threads);
  const auto num_rows = static_cast<int64_t>(ties.size());
  auto* const result = arrays::checked<int64_t>(counts, num_rows * (num_slots + 2), "counts");
  auto* const listed = arrays::optional<int64_t>(indices, num_rows * capacity, "indices");
  if (listed == nullptr) capacity = 0;
  if (capacity < 0 || (listed != nullptr && num_slots != 1)) {
    throw std::invalid_argument("indices are those of a single slot");
  }
  std::vector<cpu::Region> boxes;
  for (const RegionRow& sides : regions) {
    boxes.emplace_back();
    for (const auto& [whole, offset, size] : sides) {
      if (size < 1 || offset < 0 || offset > whole - size) throw std::invalid_argument("a region exceeds its whole");
      boxes.back().add_side(whole, offset, size);
    }
  }
  std::vector<cpu::TieSearch> searches;
  for (const auto& [row, key, places, start, shift, region_row] : ties) {
    if (row >= layers.size() || region_row >= boxes.size() || num_slots < 1 || shift < 0 || shift > 62) {
      throw std::invalid_argument("expected positions of layers and of regions, and slots");
    }
    const cpu::LayerView& layer = layers[row];
    const cpu::Region& region = boxes[region_row];
    if (region.numel() != layer.n) throw std::invalid_argument("expected a region of as many weights as its layer");
    const auto [first, begin, end, last] = places;
    if (first < 0 || last > layer.n || !std::is_sorted(places.begin(), places.end())) {
      throw std::invalid_argument("places need to ascend, and to lie in their layer");
    }
    if (begin < end && (region.in_whole(begin) < start || (region.in_whole(end - 1) - start) >> shift >= num_slots)) {
      throw std::invalid_argument("places between the first slot and the last need to lie in them");
    }
    searches.push_back({layer, &region, key, first, begin, end, last, start, shift});
  }
  cpu::count_slots(searches, num_slots, result, listed, capacity, num_threads);
}

}  // namespace gmp
