// Exact selection by a sampled bracket that is counted, never believed.
//
//   bracket  a few thousand sampled keys, or the caller, give [lo, hi] around the wanted rank
//   count    ONE read of the weights counts the keys below lo and gathers those inside, 1-2 % of them
//   refine   where the counts prove the bracket, the threshold is an order statistic of the gathered
//   ties     the gathered keys, kept per chunk, tell in which chunk the last tie that stays lies
//
// What the counts do not prove falls back to a bracket that must hold, cut into 2048 bins that are counted, so every
// further read narrows the keys by 11 bits. The same bins serve a group whose candidates would not fit the memory
// allowed. Nothing depends on the number of threads but the order in which candidates are stored.
//
// Source: Floyd and Rivest, "Expected time bounds for selection", CACM 18(3), 1975; the count as proof and the
// streaming gather follow the practice of GPU top-k.
#pragma once

#include <cmath>

#include "counter.h"
#include "order_statistic.h"
#include "sample.h"
#include "search/sample.h"
#include "select.h"

namespace gmp::cpu {

constexpr int64_t kBins = 2048;
constexpr double kSigmas = 4.0;            // half width of the sampled bracket: fails once in 10^4 selections
constexpr int64_t kSampleBytes = 1 << 18;  // a larger sample costs more than the candidates it saves
constexpr int64_t kWaveBytes = 3 << 19;    // candidates of one wave: this plus 3 % of the largest layer
constexpr int kMaxSolvers = 4;             // threads with a sample buffer of their own

template <typename Key>
class Selector {
 public:
  Selector(Key infinity, const std::vector<LayerView>& layers, const std::vector<RankedGroup>& groups, int num_threads)
      : infinity_(infinity), layers_(layers), num_threads_(num_threads), nonfinite_(layers.size(), 0) {
    found_.keys.resize(layers.size());
    for (auto* column : {&found_.num_below, &found_.num_ties, &found_.num_ties_kept, &found_.tie_indices}) {
      column->resize(layers.size());
    }
    int64_t largest = 0;
    for (const LayerView& layer : layers) largest = std::max(largest, layer.n);
    candidate_budget_ = largest * 3 / 100 + kWaveBytes / static_cast<int64_t>(sizeof(Key));
    for (const RankedGroup& group : groups) {
      Search search{{group.first_layer, group.num_layers}, group.num_prune};
      for (size_t l = 0; l < group.num_layers; ++l) search.n += layers[group.first_layer + l].n;
      searches_.push_back(search);
    }
    const int64_t num_groups = static_cast<int64_t>(groups.size());
    const int solvers = static_cast<int>(std::min<int64_t>({num_threads, kMaxSolvers, num_groups}));
    const std::unique_ptr<Key[]> scratch(new Key[static_cast<size_t>(solvers * kScratch)]);
#pragma omp parallel for schedule(dynamic, 1) num_threads(solvers)
    for (int64_t g = 0; g < num_groups; ++g) {
      if (groups[g].bracket) {
        searches_[g].counted.bracket = *groups[g].bracket;
        expect(searches_[g], searches_[g].n / 64);
      } else {
        bracket_from_sample(searches_[g], scratch.get() + omp_get_thread_num() * kScratch);
      }
    }
  }

  Cutoffs run() {
    for (std::vector<size_t> pending = unfinished(); !pending.empty(); pending = unfinished()) run_wave(pending);
    for (size_t l = 0; l < layers_.size(); ++l) {
      found_.nonfinite.push_back(nonfinite_[l] ? first_nonfinite<Key>(layers_[l], infinity_) : -1);
    }
    return std::move(found_);
  }

 private:
  // A group, and how far the search for its threshold has come.
  struct Search {
    CountedGroup counted;
    int64_t num_prune;
    int64_t n = 0;
    int64_t expected_inside = 0;  // from the sample, or exact after bins
    bool by_bins = false;         // what would not fit the memory is counted by bins first
    bool done = false;
  };

  static constexpr int64_t kSlack = Counter<Key>::kSlack;
  static constexpr int64_t kMaxSample = kSampleBytes / static_cast<int64_t>(sizeof(Key));

  // A sample, or the candidates that are left, and two copies for the quickselect.
  static constexpr int64_t kScratch = 3 * (kMaxSample + kSlack);

  // n^(2/3) balances the two costs: the sample grows with it, the candidates shrink with its square root.
  static int64_t sample_size(int64_t n) {
    const double root = std::cbrt(static_cast<double>(n));
    return std::min(n, std::clamp<int64_t>(static_cast<int64_t>(root * root), 1024, kMaxSample));
  }

  Key largest_key() const { return static_cast<Key>(infinity_ + 1); }

  std::vector<size_t> unfinished() const {
    std::vector<size_t> pending;
    for (size_t g = 0; g < searches_.size(); ++g) {
      if (!searches_[g].done) pending.push_back(g);
    }
    return pending;
  }

  void expect(Search& search, int64_t inside) const {
    search.expected_inside = inside;
    search.by_bins = inside > candidate_budget_;
  }

  void bracket_from_sample(Search& search, Key* scratch) {
    Key* const sample = scratch;
    Key* const spare = sample + kMaxSample + kSlack;
    Key* const other = spare + kMaxSample + kSlack;
    Bracket& bracket = search.counted.bracket;
    const LayerView* const layers = layers_.data() + search.counted.first_layer;
    const int64_t wanted = sample_size(search.n);
    const int64_t size =
        wanted == search.n ? 0 : draw_sample(layers, search.counted.num_layers, search.n, wanted, infinity_, sample);
    // All weights would be the sample; or there are many tiny layers, none with a whole line to its share.
    if (size == 0) {
      bracket = {0, largest_key()};
      return expect(search, search.n);
    }
    const double share = static_cast<double>(search.num_prune) / static_cast<double>(search.n);
    const double rank = share * static_cast<double>(size);
    const double half = rank_margin(rank, share, kSigmas);
    const int64_t low = static_cast<int64_t>(std::floor(rank - half)),
                  high = static_cast<int64_t>(std::ceil(rank + half));
    // Ranks reach one past the keys, hence the infinity raised by one.
    const Key infinity = static_cast<Key>(infinity_ + 1);
    const Narrowed<Key> near = narrow<Key>(sample, size, low, high, infinity, spare);
    const auto at_rank = [&](int64_t r) {
      return order_statistic<Key>(near.keys, near.n, r - near.below, near.lo, near.hi, infinity, other,
                                  near.keys == sample ? spare : sample);
    };
    const Key low_rank = low <= 0 ? Key{0} : at_rank(low);
    const Key high_rank = high >= size ? near.hi : at_rank(high);
    bracket = {low_rank == 0 ? Key{0} : static_cast<Key>(low_rank - 1),
               high_rank == 0 ? Key{0} : static_cast<Key>(high_rank - 1)};
    const int64_t sampled =
        kernels_.scan(near.keys, near.n, nullptr, infinity, std::max<Key>(low_rank, 1), high_rank, nullptr).inside;
    const double inside = highest_count(static_cast<double>(sampled), kSigmas);
    expect(search, static_cast<int64_t>(inside / static_cast<double>(size) * static_cast<double>(search.n)) + kSlack);
  }

  // As many pending groups as the memory for candidates allows, at least one.
  void run_wave(const std::vector<size_t>& pending) {
    std::vector<size_t> wave;
    std::vector<CountedGroup*> groups;
    int64_t capacity = 0, num_bins = 0, used = 0;
    for (size_t g : pending) {
      Search& search = searches_[g];
      const int64_t bins_as_keys = search.by_bins ? kBins * static_cast<int64_t>(sizeof(int64_t) / sizeof(Key)) : 0;
      search.counted.capacity = search.by_bins ? 0 : search.expected_inside + kSlack;
      if (!wave.empty() && used + search.counted.capacity + bins_as_keys > candidate_budget_) continue;
      capacity += search.counted.capacity;
      num_bins += search.by_bins ? kBins : 0;
      used += search.counted.capacity + bins_as_keys;
      wave.push_back(g);
      groups.push_back(&search.counted);
    }
    const std::unique_ptr<Key[]> candidates(new Key[static_cast<size_t>(capacity + kSlack)]);
    std::vector<int64_t> bins(static_cast<size_t>(num_bins));
    Key* next = candidates.get();
    int64_t* next_bins = bins.data();
    for (CountedGroup* group : groups) {
      group->candidates = next;
      next += group->capacity;
      group->bins = group->capacity == 0 ? next_bins : nullptr;
      next_bins += group->capacity == 0 ? kBins : 0;
    }
    const int64_t num_groups = static_cast<int64_t>(wave.size());
    Counter<Key> counter(infinity_, layers_, std::move(groups), kBins, nonfinite_, num_threads_);
    const int solvers = std::min({counter.num_threads(), kMaxSolvers, static_cast<int>(num_groups)});
    const std::unique_ptr<Key[]> scratch(new Key[static_cast<size_t>(solvers * kScratch)]);
    counter.run();
#pragma omp parallel for schedule(dynamic, 1) num_threads(solvers)
    for (int64_t i = 0; i < num_groups; ++i) {
      resolve(wave[i], counter, static_cast<size_t>(i), scratch.get() + omp_get_thread_num() * kScratch);
    }
  }

  // After a count: settle the group, or set the bracket of its next read.
  void resolve(size_t g, const Counter<Key>& counter, size_t position, Key* scratch) {
    Search& search = searches_[g];
    CountedGroup& group = search.counted;
    const auto [below, inside, pruned] = group.counts;
    const int64_t wanted = search.num_prune - pruned;
    const Proof proof = prove(wanted, below, inside);
    if (proof == Proof::kNothingWanted) {
      set_threshold(search, 0, pruned, 0, 0);
      for (size_t l = group.first_layer; l < group.first_layer + group.num_layers; ++l) {
        found_.tie_indices[l] = layers_[l].n;
      }
    } else if (proof != Proof::kHolds) {
      group.bracket = beside(group.bracket, proof, largest_key());
      search.by_bins = true;
    } else if (group.counts_only()) {
      settle(g, static_cast<Key>(group.bracket.lo), below, inside, counter, position);
    } else if (search.by_bins) {
      int64_t before = below;
      size_t bin = 0;
      while (before + group.bins[bin] < wanted) before += group.bins[bin++];
      expect(search, group.bins[bin]);
      group.bracket = bin_of(group.bracket, bin, shift_of(group.bracket, kBins));
    } else if (inside > group.capacity) {
      search.by_bins = true;
    } else {
      refine(g, wanted, counter, position, scratch);
    }
  }

  // The exact threshold from the candidates: count halves of the bracket until the rest fits the scratch.
  void refine(size_t g, int64_t wanted, const Counter<Key>& counter, size_t position, Key* scratch) {
    const CountedGroup& group = searches_[g].counted;
    const Key* const candidates = static_cast<const Key*>(group.candidates);
    Key lo = static_cast<Key>(group.bracket.lo), hi = static_cast<Key>(group.bracket.hi);
    int64_t below = group.counts.below, inside = group.counts.inside;
    const auto count = [&](Key from, Key to, Key* out) {
      return kernels_.scan(candidates, group.counts.inside, nullptr, infinity_, from, to, out).inside;
    };
    while (lo < hi && inside > kMaxSample) {
      const Key middle = static_cast<Key>(lo + (hi - lo) / 2);
      const int64_t lower = count(lo, middle, nullptr);
      if (wanted <= below + lower) {
        hi = middle;
        inside = lower;
      } else {
        lo = static_cast<Key>(middle + 1);
        below += lower;
        inside -= lower;
      }
    }
    Key key = lo;
    int64_t ties = inside;
    if (lo < hi) {
      Key* const keys = scratch;
      Key* const spare = keys + kMaxSample + kSlack;
      Key* const other = spare + kMaxSample + kSlack;
      count(lo, hi, keys);
      key = order_statistic<Key>(keys, inside, wanted - below - 1, lo, hi, infinity_, spare, other);
      const ScanCounts<Key> around = kernels_.scan(keys, inside, nullptr, infinity_, key, key, nullptr);
      below += around.below;
      ties = around.inside;
    }
    settle(g, key, below, ties, counter, position);
  }

  void set_threshold(Search& search, Key key, int64_t num_below, int64_t num_ties, int64_t num_ties_kept) {
    const size_t first = search.counted.first_layer;
    for (size_t l = first; l < first + search.counted.num_layers; ++l) {
      found_.keys[l] = key;
      found_.num_below[l] = num_below;
      found_.num_ties[l] = num_ties;
      found_.num_ties_kept[l] = num_ties_kept;
    }
    search.done = true;
  }

  // The threshold is known; find where the ties that stay end.
  void settle(size_t g, Key key, int64_t below, int64_t ties, const Counter<Key>& counter, size_t position) {
    Search& search = searches_[g];
    const CountedGroup& group = search.counted;
    // Less than `ties`, since fewer lie below than are wanted.
    int64_t kept = group.counts.pruned + below + ties - search.num_prune;
    set_threshold(search, key, group.counts.pruned + below, ties, kept);
    if (kept == 0) return;
    const Key* const candidates = static_cast<const Key*>(group.candidates);
    counter.for_each_chunk(position, [&](size_t l, const Chunk& chunk, const ChunkCandidates& own) {
      const int64_t matches =
          group.counts_only()
              ? own.count
              : kernels_.scan(candidates + own.offset, own.count, nullptr, infinity_, key, key, nullptr).inside;
      if (kept >= matches) {
        kept -= matches;
        found_.tie_indices[l] = chunk.end;
        return true;
      }
      const LayerView& layer = layers_[l];
      found_.tie_indices[l] =
          chunk.begin + find_match<Key>(static_cast<const Key*>(layer.weights) + chunk.begin, chunk.end - chunk.begin,
                                        layer.mask == nullptr ? nullptr : layer.mask + chunk.begin / 8, infinity_, key,
                                        key, kept);
      return false;
    });
  }

  const Kernels<Key>& kernels_ = kernels_for<Key>();
  const Key infinity_;
  const std::vector<LayerView>& layers_;
  const int num_threads_;
  int64_t candidate_budget_;
  std::vector<Search> searches_;  // by group
  std::vector<char> nonfinite_;   // by layer
  Cutoffs found_;
};

}  // namespace gmp::cpu
