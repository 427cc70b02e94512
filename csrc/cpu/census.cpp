#include "census.h"

#include "selector.h"

namespace gmp::cpu {
namespace {

template <typename Key>
class Sampler final : Selector<Key> {
 public:
  Sampler(Key infinity, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune, int num_threads)
      : Selector<Key>(infinity, layers, num_prune, std::vector<std::optional<Threshold>>(num_prune.size()),
                      num_threads) {}

  std::vector<Bracket> brackets() const {
    std::vector<Bracket> result;
    for (const Group<Key>& group : this->groups_) result.push_back({group.lo, group.hi});
    return result;
  }
};

template <typename Key>
class Counter {
 public:
  Counter(Key infinity, const std::vector<LayerView>& layers, const std::vector<Bracket>& brackets,
          const std::vector<Room>& rooms, int64_t* bins, int64_t num_bins)
      : infinity_(infinity),
        layers_(layers),
        brackets_(brackets),
        rooms_(rooms),
        bins_(bins),
        num_bins_(num_bins),
        census_(layers.size()),
        used_(layers.size()) {
    for (const auto& [lo, hi] : brackets) {
      int shift = 0;
      while (lo < hi && (hi - lo) >> shift >= static_cast<uint64_t>(num_bins)) ++shift;
      shifts_.push_back(shift);
    }
  }

  std::vector<Census> run(int num_threads) {
    const ChunkTable chunks(sizes_of(layers_));
    // All there is to allocate: an exception in a thread of a parallel region ends the process.
    std::vector<Worker> workers(static_cast<size_t>(num_threads));
    for (Worker& worker : workers) worker.bins.assign(static_cast<size_t>(num_bins_), 0);
#pragma omp parallel num_threads(num_threads)
    {
      Worker& worker = workers[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(monotonic : dynamic, 4) nowait
      for (int64_t i = 0; i < chunks.size(); ++i) count_chunk(chunks[i], worker);
      flush(worker);
    }
    for (size_t l = 0; l < layers_.size(); ++l) {
      if (census_[l].nonfinite < 0) continue;
      const LayerView& layer = layers_[l];
      census_[l].nonfinite = find_match<Key>(static_cast<const Key*>(layer.weights), layer.n, layer.mask, infinity_,
                                             infinity_, static_cast<Key>(infinity_ + 1), 0);
    }
    return std::move(census_);
  }

 private:
  struct Worker {
    std::unique_ptr<Key[]> keys{new Key[static_cast<size_t>(kChunk + kGatherSlackBytes / sizeof(Key))]};
    size_t layer = 0;
    bool has_counted = false;  // anything of that layer
    Census found = {};
    std::vector<int64_t> bins = {};
  };

  void count_chunk(const Chunk& chunk, Worker& worker) {
    const LayerView& layer = layers_[chunk.tensor];
    if (worker.layer != chunk.tensor) {
      flush(worker);
      worker.layer = chunk.tensor;
    }
    const Bracket& bracket = brackets_[chunk.tensor];
    const Key lo = static_cast<Key>(bracket.lo), hi = static_cast<Key>(bracket.hi);
    const ScanCounts<Key> counts = kernels_.scan(
        static_cast<const Key*>(layer.weights) + chunk.begin, chunk.end - chunk.begin,
        layer.mask == nullptr ? nullptr : layer.mask + chunk.begin / 8, infinity_, lo, hi, worker.keys.get());
    Census& found = worker.found;
    found.below += counts.below;
    found.inside += counts.inside;
    found.pruned += counts.pruned;
    if (counts.largest >= infinity_) found.nonfinite = 0;  // there is one; where, is looked up once
    worker.has_counted = true;
    for (int64_t k = 0; k < counts.inside; ++k) {
      ++worker.bins[static_cast<size_t>(static_cast<Key>(worker.keys[k] - lo) >> shifts_[chunk.tensor])];
    }
    const Room& room = rooms_[chunk.tensor];
    if (room.capacity == 0 || counts.inside == 0) return;
    int64_t place;
#pragma omp atomic capture
    {
      place = used_[chunk.tensor];
      used_[chunk.tensor] += counts.inside;
    }
    if (place + counts.inside <= room.capacity) {
      std::copy_n(worker.keys.get(), counts.inside, static_cast<Key*>(room.keys) + place);
    }
  }

  void flush(Worker& worker) {
    if (!worker.has_counted) return;
#pragma omp critical(gmp_kernels_census)
    {
      Census& census = census_[worker.layer];
      census.below += worker.found.below;
      census.inside += worker.found.inside;
      census.pruned += worker.found.pruned;
      census.nonfinite = std::max(census.nonfinite, worker.found.nonfinite);
      int64_t* const bins = bins_ + static_cast<int64_t>(worker.layer) * num_bins_;
      for (int64_t b = 0; b < num_bins_; ++b) bins[b] += worker.bins[static_cast<size_t>(b)];
    }
    worker.found = Census{};
    worker.has_counted = false;
    std::fill(worker.bins.begin(), worker.bins.end(), 0);
  }

  const Kernels<Key>& kernels_ = kernels_for<Key>();
  const Key infinity_;
  const std::vector<LayerView>& layers_;
  const std::vector<Bracket>& brackets_;
  const std::vector<Room>& rooms_;
  int64_t* const bins_;
  const int64_t num_bins_;
  std::vector<Census> census_;
  std::vector<int64_t> used_;  // of the rooms
  std::vector<int> shifts_;
};

}  // namespace

std::vector<Bracket> sample(DType dtype, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune,
                            int num_threads) {
  switch (dtype) {
#define GMP_DTYPE(name, key, infinity) \
  case DType::name:                    \
    return Sampler<key>(infinity, layers, num_prune, num_threads).brackets();
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
  __builtin_unreachable();
}

std::vector<Census> count(DType dtype, const std::vector<LayerView>& layers, const std::vector<Bracket>& brackets,
                          const std::vector<Room>& rooms, int64_t* bins, int64_t num_bins, int num_threads) {
  switch (dtype) {
#define GMP_DTYPE(name, key, infinity) \
  case DType::name:                    \
    return Counter<key>(infinity, layers, brackets, rooms, bins, num_bins).run(num_threads);
    GMP_DTYPES(GMP_DTYPE)
#undef GMP_DTYPE
  }
  __builtin_unreachable();
}

}  // namespace gmp::cpu
