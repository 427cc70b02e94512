#include "select.h"

#include "selector.h"

namespace gmp::cpu {
namespace {

template <typename Key>
std::vector<LayerCounts> count_typed(Key infinity, const std::vector<LayerView>& layers,
                                     const std::vector<Bracket>& brackets, const std::vector<Candidates>& candidates,
                                     int64_t* bins, int64_t num_bins, int num_threads) {
  std::vector<CountedGroup> groups;
  std::vector<CountedGroup*> addresses;
  groups.reserve(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    groups.push_back(
        {l, 1, brackets[l], bins + static_cast<int64_t>(l) * num_bins, candidates[l].keys, candidates[l].capacity});
    addresses.push_back(&groups.back());
  }
  std::vector<char> nonfinite(layers.size(), 0);
  std::vector<LayerCounts> found(layers.size());
  Counter<Key>(infinity, layers, std::move(addresses), num_bins, nonfinite, num_threads).run();
  for (size_t l = 0; l < layers.size(); ++l) {
    found[l].counts = groups[l].counts;
    if (nonfinite[l]) found[l].nonfinite = first_nonfinite<Key>(layers[l], infinity);
  }
  return found;
}

}  // namespace

Cutoffs select(DType dtype, const std::vector<LayerView>& layers, const std::vector<RankedGroup>& groups,
               int num_threads) {
  return with_dtype(
      dtype, [&](auto infinity) { return Selector<decltype(infinity)>(infinity, layers, groups, num_threads).run(); });
}

std::vector<LayerCounts> count(DType dtype, const std::vector<LayerView>& layers, const std::vector<Bracket>& brackets,
                               const std::vector<Candidates>& candidates, int64_t* bins, int64_t num_bins,
                               int num_threads) {
  return with_dtype(dtype, [&](auto infinity) {
    return count_typed(infinity, layers, brackets, candidates, bins, num_bins, num_threads);
  });
}

}  // namespace gmp::cpu
