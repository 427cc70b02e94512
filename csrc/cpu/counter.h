// THE counter: one read of layers, each against the bracket of its group.
#pragma once

#include <omp.h>

#include <memory>

#include "chunks.h"
#include "kernels.h"
#include "layers.h"
#include "search/bracket.h"

namespace gmp::cpu {

// Layers that are counted against one bracket, and what is wanted of the keys inside.
struct CountedGroup {
  size_t first_layer, num_layers;
  Bracket bracket{0, 0};
  int64_t* bins = nullptr;     // adds them up by bin; nullptr: not wanted
  void* candidates = nullptr;  // receives them, in the order of each chunk, as far as they fit
  int64_t capacity = 0;        // of the candidates, in keys
  BracketCounts counts = {};

  bool counts_only() const { return bracket.lo == bracket.hi; }
};

// Where the candidates of one chunk are among those of its group, and how many keys of it are inside.
struct ChunkCandidates {
  int64_t offset, count;
};

// The constructor allocates all that run() needs: an exception in a thread of a parallel region ends the process.
template <typename Key>
class Counter {
 public:
  static constexpr int64_t kSlack = kGatherSlackBytes / static_cast<int64_t>(sizeof(Key));

  // Sets a group's counts, and nonfinite[l] of a layer with an unpruned NaN or Inf.
  Counter(Key infinity, const std::vector<LayerView>& layers, std::vector<CountedGroup*> groups, int64_t num_bins,
          std::vector<char>& nonfinite, int num_threads)
      : infinity_(infinity), layers_(layers), nonfinite_(nonfinite), groups_(std::move(groups)) {
    std::vector<int64_t> sizes;
    for (size_t g = 0; g < groups_.size(); ++g) {
      CountedGroup& group = *groups_[g];
      group.counts = {};
      first_owner_.push_back(owners_.size());
      shifts_.push_back(shift_of(group.bracket, num_bins));
      wants_bins_ |= group.bins != nullptr;
      for (size_t l = 0; l < group.num_layers; ++l) {
        sizes.push_back(layers[group.first_layer + l].n);
        owners_.push_back({g, group.first_layer + l});
      }
    }
    first_owner_.push_back(owners_.size());
    chunks_ = ChunkTable(std::move(sizes));
    candidates_.resize(static_cast<size_t>(chunks_.size()));
    const int64_t most = std::max<int64_t>(1, chunks_.size() / 2);
    for (int64_t t = 0; t < std::min<int64_t>(num_threads, most); ++t)
      workers_.emplace_back(wants_bins_ ? num_bins : 0);
  }

  void run() noexcept {
#pragma omp parallel num_threads(static_cast<int>(workers_.size()))
    {
      Worker& worker = workers_[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(monotonic : dynamic, 4) nowait
      for (int64_t i = 0; i < chunks_.size(); ++i) candidates_[i] = count_chunk(chunks_[i], worker);
      flush(worker);
    }
  }

  int num_threads() const { return static_cast<int>(workers_.size()); }

  // Calls visit(layer, chunk, candidates) for the chunks of a group in the order of the flat index, until it returns
  // false. `position` is the group's among those given.
  template <typename Visit>
  void for_each_chunk(size_t position, Visit visit) const {
    for (size_t o = first_owner_[position]; o < first_owner_[position + 1]; ++o) {
      for (int64_t i = chunks_.first_of(o); i < chunks_.first_of(o + 1); ++i) {
        if (!visit(owners_[o].layer, chunks_[i], candidates_[i])) return;
      }
    }
  }

 private:
  struct Owner {
    size_t group, layer;
  };

  // What one thread carries from chunk to chunk.
  struct Worker {
    explicit Worker(int64_t num_bins) : bins(static_cast<size_t>(num_bins)) {}

    std::unique_ptr<Key[]> keys{new Key[static_cast<size_t>(kChunk + kSlack)]};  // those inside, of one chunk
    std::vector<int64_t> bins;
    int64_t* target = nullptr;  // whose bins these are
  };

  ChunkCandidates count_chunk(const Chunk& chunk, Worker& worker) {
    const Owner& owner = owners_[chunk.tensor];
    CountedGroup& group = *groups_[owner.group];
    const LayerView& layer = layers_[owner.layer];
    const Key lo = static_cast<Key>(group.bracket.lo), hi = static_cast<Key>(group.bracket.hi);
    const bool gathers = !group.counts_only() || group.capacity > 0;
    const ScanCounts<Key> counts =
        kernels_.scan(static_cast<const Key*>(layer.weights) + chunk.begin, chunk.end - chunk.begin,
                      layer.mask == nullptr ? nullptr : layer.mask + chunk.begin / 8, infinity_, lo, hi,
                      gathers ? worker.keys.get() : nullptr);
#pragma omp atomic
    group.counts.below += counts.below;
#pragma omp atomic
    group.counts.pruned += counts.pruned;
    if (counts.largest >= infinity_) {
#pragma omp atomic write
      nonfinite_[owner.layer] = 1;
    }
    if (group.bins != nullptr) add_to_bins(group, shifts_[owner.group], counts.inside, worker);
    int64_t offset;
#pragma omp atomic capture
    {
      offset = group.counts.inside;
      group.counts.inside += counts.inside;
    }
    // Past the capacity nothing is stored: more keys inside than that say so.
    if (offset + counts.inside <= group.capacity) {
      std::copy_n(worker.keys.get(), counts.inside, static_cast<Key*>(group.candidates) + offset);
    }
    return {offset, counts.inside};
  }

  void add_to_bins(CountedGroup& group, int shift, int64_t inside, Worker& worker) {
    if (worker.target != group.bins) flush(worker);
    worker.target = group.bins;
    if (group.counts_only()) {
      worker.bins[0] += inside;
      return;
    }
    const Key lo = static_cast<Key>(group.bracket.lo);
    for (int64_t i = 0; i < inside; ++i)
      ++worker.bins[static_cast<size_t>(static_cast<Key>(worker.keys[i] - lo) >> shift)];
  }

  void flush(Worker& worker) {
    if (worker.target == nullptr) return;
#pragma omp critical(gmp_kernels_bins)
    for (size_t b = 0; b < worker.bins.size(); ++b) worker.target[b] += worker.bins[b];
    std::fill(worker.bins.begin(), worker.bins.end(), 0);
  }

  const Kernels<Key>& kernels_ = kernels_for<Key>();
  const Key infinity_;
  const std::vector<LayerView>& layers_;
  std::vector<char>& nonfinite_;
  const std::vector<CountedGroup*> groups_;
  bool wants_bins_ = false;
  std::vector<int> shifts_;          // by group
  std::vector<Owner> owners_;        // of the tensors in `chunks_`
  std::vector<size_t> first_owner_;  // by group, and one more
  ChunkTable chunks_{{}};
  std::vector<ChunkCandidates> candidates_;  // by chunk
  std::vector<Worker> workers_;
};

}  // namespace gmp::cpu
