// Exact selection by a sampled bracket that is counted, never believed.
//
//   bracket  a few thousand sampled keys, or the last threshold, give [lo, hi] around the wanted rank
//   count    ONE read of the weights counts the keys below lo and gathers those inside, 1-2 % of them
//   refine   below < wanted <= below + inside proves the bracket; the threshold is an order statistic of the gathered
//   ties     the gathered keys, kept per chunk, tell in which chunk the last tie that stays lies
//
// What the counts do not prove falls back to a bracket that must hold: [0, lo) or (hi, max], cut into 2048 bins that
// are counted, so every further read narrows the keys by 11 bits. The same bins serve a group whose candidates would
// not fit the memory allowed. Nothing depends on the number of threads but the order in which candidates are stored.
//
// Source: Floyd and Rivest, "Expected time bounds for selection", CACM 18(3), 1975; the count as proof and the
// streaming gather follow the practice of GPU top-k.
#pragma once

#include <omp.h>

#include <cmath>
#include <memory>

#include "chunks.h"
#include "kernels.h"
#include "order_statistic.h"
#include "sample.h"
#include "select.h"

namespace gmp::cpu {

constexpr int kBins = 2048;
constexpr double kSigmas = 4.0;            // half width of the sampled bracket: fails once in 10^4 selections
constexpr int64_t kSampleBytes = 1 << 18;  // a larger sample costs more than the candidates it saves
constexpr int64_t kWaveBytes = 1 << 21;    // candidates of one wave: this plus 3 % of the largest layer
constexpr int kMaxSolvers = 4;             // threads with a sample buffer of their own

enum class Mode { kGather, kHistogram };

// All layers that share one threshold, and how far its search has come.
template <typename Key>
struct Group {
  size_t first_layer, num_layers;
  int64_t n;
  int64_t num_prune;
  Mode mode = Mode::kGather;
  Key lo = 0, hi = 0;
  int64_t expected_inside = 0;  // from the sample, or exact after a histogram
  // What the last count found:
  int64_t below = 0, inside = 0, pruned = 0;
  std::vector<int64_t> bins;
  Key* candidates = nullptr;  // this group's part of the wave's memory, room for `capacity` keys
  int64_t capacity = 0, used = 0;
  // The answer:
  bool done = false;
  Selection selection;

  bool counts_only() const { return lo == hi; }
};

// The keys gathered from one chunk: how many, and where among the candidates of its group (if they were stored).
struct Gathered {
  int64_t offset, count;
};

// What a count left behind for one group.
struct Counted {
  const ChunkTable& chunks;
  const std::vector<size_t>& layers;  // by position in `chunks`
  const std::vector<Gathered>& gathered;
  int64_t first_chunk, last_chunk;
};

template <typename Key>
class Selector {
 public:
  Selector(Key infinity, const std::vector<LayerView>& layers, const std::vector<int64_t>& num_prune,
           const std::vector<std::optional<Threshold>>& hints, int num_threads)
      : infinity_(infinity), layers_(layers), num_threads_(num_threads), nonfinite_(layers.size(), 0) {
    const bool global = num_prune.size() != layers.size();
    for (size_t g = 0; g < num_prune.size(); ++g) {
      Group<Key> group;
      group.first_layer = g;
      group.num_layers = global ? layers.size() : 1;
      group.num_prune = num_prune[g];
      group.n = 0;
      for (size_t l = g; l < g + group.num_layers; ++l) group.n += layers[l].n;
      group.selection.cuts.reserve(group.num_layers);  // resolve() must not allocate
      groups_.push_back(std::move(group));
    }
    int64_t largest = 0;
    for (const LayerView& layer : layers) largest = std::max(largest, layer.n);
    candidate_budget_ = largest * 3 / 100 + kWaveBytes / static_cast<int64_t>(sizeof(Key));
    const int64_t num_groups = static_cast<int64_t>(groups_.size());
    const int solvers = static_cast<int>(std::min<int64_t>({num_threads, kMaxSolvers, num_groups}));
    const std::unique_ptr<Key[]> scratch(new Key[static_cast<size_t>(solvers * kScratch)]);
#pragma omp parallel for schedule(dynamic, 1) num_threads(solvers)
    for (int64_t g = 0; g < num_groups; ++g) {
      if (!hints[g] || !bracket_from_hint(groups_[g], *hints[g])) {
        bracket_from_sample(groups_[g], scratch.get() + omp_get_thread_num() * kScratch);
      }
    }
  }

  std::vector<Selection> run() {
    for (std::vector<size_t> pending = unfinished(); !pending.empty(); pending = unfinished()) run_wave(pending);
    std::vector<Selection> selections;
    for (Group<Key>& group : groups_) selections.push_back(take_selection(group));
    return selections;
  }

 protected:
  static constexpr int64_t kSlack = kGatherSlackBytes / static_cast<int64_t>(sizeof(Key));
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
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (!groups_[g].done) pending.push_back(g);
    }
    return pending;
  }

  // Weights drift little between two steps: 1/64 of the threshold to each side holds about 1 % of them. A count that
  // has moved by more than 0.1 % of n would often miss, and a miss costs a read.
  bool bracket_from_hint(Group<Key>& group, const Threshold& hint) const {
    const int64_t hinted = hint.num_below + hint.num_ties - hint.num_ties_kept;
    if (hint.num_ties == 0 || std::isnan(hint.value) || std::abs(hinted - group.num_prune) > group.n / 1024) {
      return false;
    }
    const Key key = static_cast<Key>(key_of_magnitude(std::fabs(hint.value), infinity_));
    const Key unit = static_cast<Key>(infinity_ & (~infinity_ + 1));  // one step of the exponent
    const Key drift = static_cast<Key>(std::max<Key>(unit / 64, 1));
    group.lo = key > drift ? static_cast<Key>(key - drift) : Key{0};
    group.hi = static_cast<Key>(std::min<Key>(largest_key(), static_cast<Key>(key + drift)));
    expect(group, group.n / 64);
    return true;
  }

  // What will not fit the memory is counted by bins first.
  void expect(Group<Key>& group, int64_t inside) const {
    group.expected_inside = inside;
    group.mode = inside > candidate_budget_ ? Mode::kHistogram : Mode::kGather;
  }

  // As many pending groups as the memory for candidates allows, at least one.
  void run_wave(const std::vector<size_t>& pending) {
    std::vector<size_t> wave, wave_layers;
    int64_t capacity = 0, with_bins = 0;
    for (size_t g : pending) {
      Group<Key>& group = groups_[g];
      const bool bins = group.mode == Mode::kHistogram;
      const int64_t bins_as_keys = bins ? kBins * static_cast<int64_t>(sizeof(int64_t) / sizeof(Key)) : 0;
      group.capacity = bins ? 0 : group.expected_inside + kSlack;
      if (!wave.empty() && with_bins + group.capacity + bins_as_keys > candidate_budget_) continue;
      capacity += group.capacity;
      with_bins += group.capacity + bins_as_keys;
      group.below = group.inside = group.pruned = group.used = 0;
      if (group.mode == Mode::kHistogram) group.bins.assign(kBins, 0);
      wave.push_back(g);
      for (size_t l = 0; l < group.num_layers; ++l) wave_layers.push_back(group.first_layer + l);
    }
    std::vector<int64_t> sizes;
    for (size_t l : wave_layers) sizes.push_back(layers_[l].n);
    const ChunkTable chunks(std::move(sizes));
    const int threads = static_cast<int>(std::clamp<int64_t>(chunks.size() / 2, 1, num_threads_));
    const int solvers = std::min({threads, kMaxSolvers, static_cast<int>(wave.size())});
    const std::unique_ptr<Key[]> candidates(new Key[static_cast<size_t>(capacity + kSlack)]);
    const std::unique_ptr<Key[]> scratch(new Key[static_cast<size_t>(solvers * kScratch)]);
    std::vector<Gathered> gathered(static_cast<size_t>(chunks.size()));
    std::vector<size_t> group_of_layer(layers_.size());
    std::vector<int64_t> first_chunk;  // of each group of the wave
    size_t position = 0;
    Key* next = candidates.get();
    for (size_t g : wave) {
      Group<Key>& group = groups_[g];
      group.candidates = next;
      next += group.capacity;
      first_chunk.push_back(chunks.first_of(position));
      position += group.num_layers;
      for (size_t l = 0; l < group.num_layers; ++l) group_of_layer[group.first_layer + l] = g;
    }
    first_chunk.push_back(chunks.size());
    const int64_t num_groups = static_cast<int64_t>(wave.size());

    // All there is to allocate: an exception in a thread of a parallel region ends the process.
    std::vector<Worker> workers(static_cast<size_t>(threads));
    if (with_bins > capacity) {
      for (Worker& worker : workers) worker.bins.assign(kBins, 0);
    }
#pragma omp parallel num_threads(threads)
    {
      Worker& worker = workers[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(monotonic : dynamic, 4) nowait
      for (int64_t i = 0; i < chunks.size(); ++i) {
        const Chunk chunk = chunks[i];
        const size_t layer = wave_layers[chunk.tensor];
        gathered[i] = count_chunk(groups_[group_of_layer[layer]], layer, chunk.begin, chunk.end, worker);
      }
      worker.flush();
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(solvers)
    for (int64_t i = 0; i < num_groups; ++i) {
      const Counted counted{chunks, wave_layers, gathered, first_chunk[i], first_chunk[i + 1]};
      Group<Key>& group = groups_[wave[i]];
      resolve(group, counted, scratch.get() + omp_get_thread_num() * kScratch);
      std::vector<int64_t>().swap(group.bins);  // the next wave needs the memory
    }
  }

  void bracket_from_sample(Group<Key>& group, Key* scratch) {
    Key* const sample = scratch;
    Key* const spare = sample + kMaxSample + kSlack;
    Key* const other = spare + kMaxSample + kSlack;
    const LayerView* const layers = layers_.data() + group.first_layer;
    const int64_t wanted = sample_size(group.n);
    const int64_t size =
        wanted == group.n ? 0 : draw_sample(layers, group.num_layers, group.n, wanted, infinity_, sample);
    // All weights would be the sample; or there are many tiny layers, none with a whole line to its share.
    if (size == 0) {
      group.lo = 0;
      group.hi = largest_key();
      return expect(group, group.n);
    }
    const double share = static_cast<double>(group.num_prune) / static_cast<double>(group.n);
    const double rank = share * static_cast<double>(size);
    const double half = 2.0 + kSigmas * std::sqrt(rank * (1.0 - share));
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
    group.lo = low_rank == 0 ? Key{0} : static_cast<Key>(low_rank - 1);
    group.hi = high_rank == 0 ? Key{0} : static_cast<Key>(high_rank - 1);
    const int64_t sampled =
        kernels_.scan(near.keys, near.n, nullptr, infinity, std::max<Key>(low_rank, 1), high_rank, nullptr).inside;
    const double inside = static_cast<double>(sampled) + kSigmas * std::sqrt(static_cast<double>(sampled));
    expect(group, static_cast<int64_t>(inside / static_cast<double>(size) * static_cast<double>(group.n)) + kSlack);
  }

  // What one thread carries from chunk to chunk.
  struct Worker {
    std::unique_ptr<Key[]> keys{new Key[static_cast<size_t>(kChunk + kSlack)]};  // those inside, of one chunk
    Group<Key>* binned = nullptr;                                                // whose bins these are
    std::vector<int64_t> bins = {};                                              // zeros, in waves that count by bins

    void bin(Group<Key>& group, int64_t n) {
      if (binned != &group) flush();
      binned = &group;
      const int shift = bin_shift(group);
      for (int64_t i = 0; i < n; ++i) ++bins[static_cast<size_t>((keys[i] - group.lo) >> shift)];
    }

    void flush() {
      if (binned == nullptr) return;
#pragma omp critical(gmp_kernels_bins)
      for (size_t b = 0; b < bins.size(); ++b) binned->bins[b] += bins[b];
      std::fill(bins.begin(), bins.end(), 0);
    }
  };

  Gathered count_chunk(Group<Key>& group, size_t layer_index, int64_t begin, int64_t end, Worker& worker) {
    const LayerView& layer = layers_[layer_index];
    const ScanCounts<Key> counts = kernels_.scan(static_cast<const Key*>(layer.weights) + begin, end - begin,
                                                 layer.mask == nullptr ? nullptr : layer.mask + begin / 8, infinity_,
                                                 group.lo, group.hi, group.counts_only() ? nullptr : worker.keys.get());
#pragma omp atomic
    group.below += counts.below;
#pragma omp atomic
    group.inside += counts.inside;
#pragma omp atomic
    group.pruned += counts.pruned;
    if (counts.largest >= infinity_) {
#pragma omp atomic write
      nonfinite_[layer_index] = 1;
    }
    int64_t offset = 0;
    if (group.counts_only()) return {offset, counts.inside};
    if (group.mode == Mode::kHistogram) {
      worker.bin(group, counts.inside);
      return {offset, counts.inside};
    }
#pragma omp atomic capture
    {
      offset = group.used;
      group.used += counts.inside;
    }
    // Past the room given, nothing is stored: `used` beyond `capacity` tells resolve.
    if (offset + counts.inside <= group.capacity) {
      std::copy_n(worker.keys.get(), counts.inside, group.candidates + offset);
    }
    return {offset, counts.inside};
  }

  // Smallest shift that maps [lo, hi] into the bins.
  static int bin_shift(const Group<Key>& group) {
    int shift = 0;
    while (static_cast<uint64_t>(group.hi - group.lo) >> shift >= kBins) ++shift;
    return shift;
  }

  // After a count: settle the group, or set the bracket of its next read.
  void resolve(Group<Key>& group, const Counted& counted, Key* scratch) {
    const int64_t wanted = group.num_prune - group.pruned;  // rank (1-based) among the unpruned
    if (wanted <= 0) {
      const int64_t none = 0;
      finish(group, Threshold{0.0, group.pruned, none, none});
      for (size_t l = 0; l < group.num_layers; ++l) {
        group.selection.cuts.push_back(layers_[group.first_layer + l].n);
      }
      return;
    }
    if (wanted <= group.below || wanted > group.below + group.inside) {
      const bool too_high = wanted <= group.below;
      const Key lo = group.lo, hi = group.hi;
      group.lo = too_high ? Key{0} : static_cast<Key>(hi + 1);
      group.hi = too_high ? static_cast<Key>(lo - 1) : largest_key();
      group.mode = Mode::kHistogram;
      return;
    }
    if (group.counts_only()) {
      settle(group, group.lo, group.below, group.inside, counted);
    } else if (group.mode == Mode::kHistogram) {
      narrow_to_bin(group, wanted);
    } else if (group.used > group.capacity) {
      group.mode = Mode::kHistogram;
    } else {
      refine(group, wanted, counted, scratch);
    }
  }

  void narrow_to_bin(Group<Key>& group, int64_t wanted) {
    int64_t below = group.below;
    size_t bin = 0;
    while (below + group.bins[bin] < wanted) below += group.bins[bin++];
    const int shift = bin_shift(group);
    const Key width = static_cast<Key>((uint64_t{1} << shift) - 1);
    const Key lo = static_cast<Key>(group.lo + (static_cast<Key>(bin) << shift));
    group.hi = static_cast<Key>(std::min<uint64_t>(group.hi, static_cast<uint64_t>(lo) + width));
    group.lo = lo;
    expect(group, group.bins[bin]);
  }

  // The exact threshold from the gathered keys: count halves of the bracket until the rest fits the scratch.
  void refine(Group<Key>& group, int64_t wanted, const Counted& counted, Key* scratch) {
    Key lo = group.lo, hi = group.hi;
    int64_t below = group.below, inside = group.inside;
    const auto count = [&](Key from, Key to, Key* out) {
      return kernels_.scan(group.candidates, group.inside, nullptr, infinity_, from, to, out).inside;
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
    Key threshold = lo;
    int64_t ties = inside;
    if (lo < hi) {
      Key* const keys = scratch;
      Key* const spare = keys + kMaxSample + kSlack;
      Key* const other = spare + kMaxSample + kSlack;
      count(lo, hi, keys);
      threshold = order_statistic<Key>(keys, inside, wanted - below - 1, lo, hi, infinity_, spare, other);
      const ScanCounts<Key> around = kernels_.scan(keys, inside, nullptr, infinity_, threshold, threshold, nullptr);
      below += around.below;
      ties = around.inside;
    }
    settle(group, threshold, below, ties, counted);
  }

  // The threshold is known; find where the ties that stay end.
  void settle(Group<Key>& group, Key key, int64_t below, int64_t ties, const Counted& counted) {
    const int64_t num_below = group.pruned + below;
    int64_t kept = num_below + ties - group.num_prune;  // less than `ties`, since num_below < num_prune
    finish(group, Threshold{magnitude_of_key(key, infinity_), num_below, ties, kept});
    group.selection.cuts.assign(group.num_layers, 0);
    if (kept == 0) return;
    for (int64_t i = counted.first_chunk; i < counted.last_chunk; ++i) {
      const Gathered& g = counted.gathered[i];
      const int64_t matches =
          group.counts_only()
              ? g.count
              : kernels_.scan(group.candidates + g.offset, g.count, nullptr, infinity_, key, key, nullptr).inside;
      const Chunk chunk = counted.chunks[i];
      const size_t layer_index = counted.layers[chunk.tensor];
      int64_t& cut = group.selection.cuts[layer_index - group.first_layer];
      if (kept >= matches) {
        kept -= matches;
        cut = chunk.end;
        continue;
      }
      const LayerView& layer = layers_[layer_index];
      cut = chunk.begin + find_match<Key>(static_cast<const Key*>(layer.weights) + chunk.begin, chunk.end - chunk.begin,
                                          layer.mask == nullptr ? nullptr : layer.mask + chunk.begin / 8, infinity_,
                                          key, key, kept);
      return;
    }
  }

  Selection take_selection(Group<Key>& group) const {
    for (size_t l = group.first_layer; l < group.first_layer + group.num_layers; ++l) {
      group.selection.nonfinite.push_back(nonfinite_[l] ? first_nonfinite(layers_[l]) : -1);
    }
    return std::move(group.selection);
  }

  void finish(Group<Key>& group, const Threshold& threshold) {
    group.selection.threshold = threshold;
    group.done = true;
  }

  int64_t first_nonfinite(const LayerView& layer) const {
    return find_match<Key>(static_cast<const Key*>(layer.weights), layer.n, layer.mask, infinity_, infinity_,
                           largest_key(), 0);
  }

  const Kernels<Key>& kernels_ = kernels_for<Key>();
  const Key infinity_;
  const std::vector<LayerView> layers_;
  const int num_threads_;
  int64_t candidate_budget_;
  std::vector<Group<Key>> groups_;
  std::vector<char> nonfinite_;
};

}  // namespace gmp::cpu
