#include "tally.h"

#include <atomic>
#include <mutex>

#include "selector.h"

namespace gmp::cpu {
namespace {

template <typename Key>
class KeyedTally final : public Tally, Selector<Key> {
  using Base = Selector<Key>;
  using Base::groups_, Base::layers_, Base::infinity_;

 public:
  KeyedTally(Key infinity, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune, int num_threads)
      : Base(infinity, layers, num_prune, std::vector<std::optional<Threshold>>(num_prune.size()), num_threads),
        chunks_(sizes_of(layers)),
        gathered_(static_cast<size_t>(chunks_.size())),
        workers_(static_cast<size_t>(num_threads)),
        storage_(groups_.size()),
        chunks_left_(groups_.size()) {
    for (size_t l = 0; l < layers_.size(); ++l) positions_.push_back(l);
    for (size_t g = 0; g < groups_.size(); ++g) {
      Group<Key>& group = groups_[g];
      for (size_t l = 0; l < group.num_layers; ++l) group_of_layer_.push_back(g);
      chunks_left_[g] = chunks_.first_of(group.first_layer + group.num_layers) - chunks_.first_of(group.first_layer);
      // The sample is from before the step: 1/256 of the threshold to each side for what the step moves it.
      const Key drift = static_cast<Key>(std::max<Key>((infinity_ & (~infinity_ + 1)) / 256, 1));
      group.lo = group.lo > drift ? static_cast<Key>(group.lo - drift) : Key{0};
      group.hi = static_cast<Key>(std::min<uint64_t>(this->largest_key(), uint64_t{group.hi} + drift));
      this->expect(group, group.expected_inside + group.n / 128);
      group.capacity = group.expected_inside + Base::kSlack;
    }
  }

  void count(size_t layer, int64_t begin, int64_t end) override {
    const size_t g = group_of_layer_[layer];
    Group<Key>& group = groups_[g];
    if (group.mode == Mode::kHistogram) return;
    {
      const std::lock_guard<std::mutex> lock(allocation_);
      if (storage_[g] == nullptr) {
        storage_[g].reset(new Key[static_cast<size_t>(group.capacity + Base::kSlack)]);
        group.candidates = storage_[g].get();
      }
    }
    gathered_[static_cast<size_t>(chunks_.first_of(layer) + begin / kChunk)] =
        this->count_chunk(group, layer, begin, end, workers_[static_cast<size_t>(omp_get_thread_num())]);
    if (chunks_left_[g].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    const Counted counted{chunks_, positions_, gathered_, chunks_.first_of(group.first_layer),
                          chunks_.first_of(group.first_layer + group.num_layers)};
    const std::unique_ptr<Key[]> scratch(new Key[static_cast<size_t>(Base::kScratch)]);
    this->resolve(group, counted, scratch.get());
    storage_[g].reset();
  }

  std::vector<std::optional<Selection>> take_selections() override {
    std::vector<std::optional<Selection>> selections;
    for (Group<Key>& group : groups_) {
      selections.push_back(group.done ? std::optional<Selection>(this->take_selection(group)) : std::nullopt);
    }
    return selections;
  }

 private:
  const ChunkTable chunks_;
  std::vector<Gathered> gathered_;
  std::vector<typename Base::Worker> workers_;
  std::vector<size_t> positions_, group_of_layer_;
  std::mutex allocation_;
  std::vector<std::unique_ptr<Key[]>> storage_;  // candidates of the groups that are being counted
  std::vector<std::atomic<int64_t>> chunks_left_;
};

// FNV-1a over a small sample.
template <typename Key>
uint64_t fingerprint(const LayerView& layer, Key infinity) {
  constexpr int64_t kWanted = 1024;
  Key sample[kWanted];
  const int64_t size = draw_sample(&layer, 1, layer.n, kWanted, infinity, sample);
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int64_t i = 0; i < size; ++i) hash = (hash ^ sample[i]) * 0x100000001b3ull;
  return hash;
}

}  // namespace

std::unique_ptr<Tally> begin_tally(DType dtype, const std::vector<LayerView>& layers,
                                   const std::vector<int64_t>& num_prune, int num_threads) {
  switch (dtype) {
#define GMP_DTYPE(name, key, infinity) \
  case DType::name:                    \
    return std::make_unique<KeyedTally<key>>(infinity, layers, num_prune, num_threads);
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
  __builtin_unreachable();
}

std::vector<uint64_t> fingerprints(DType dtype, const std::vector<LayerView>& layers) {
  std::vector<uint64_t> hashes;
  for (const LayerView& layer : layers) {
    switch (dtype) {
#define GMP_DTYPE(name, key, infinity)                        \
  case DType::name:                                           \
    hashes.push_back(fingerprint<key>(layer, key{infinity})); \
    break;
      GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
    }
  }
  return hashes;
}

}  // namespace gmp::cpu
