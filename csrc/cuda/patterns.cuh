// Layers with patterns or scores. `rank` kernels find what of them is ranked: bits of the weights that are neither
// pruned nor protected, or sums over blocks. A selection of that is an ordinary one. `settle` kernels write what
// follows from its cutoff. See order/pattern.h.
#pragma once

#include <limits>

#include "apply.cuh"
#include "formats.cuh"
#include "ties.cuh"

namespace gmp::cuda::kernels {

// Blocks per multiprocessor for kernels whose threads need more registers than those of kReaders.
inline constexpr unsigned kFewReaders = 2;

__device__ __forceinline__ bool is_kept(const uint8_t* mask, int64_t i) {
  return load_bits(mask, i / kEach * kEach, kEach) >> (i % kEach) & 1;
}

// Whether an unpruned one of eight weights is NaN or Inf.
template <typename Key>
__device__ __forceinline__ bool holds_nonfinite(const Key (&raw)[kEach], unsigned bits, Key infinity) {
  unsigned found = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) found |= static_cast<unsigned>(magnitude_bits(raw[j]) >= infinity) << j;
  return (found & bits) != 0;
}

// Every thread that has found one may call it; all of them store the same.
__device__ inline void report_nonfinite(const PatternRow& row, bool found) {
  if (found && row.nonfinite != 0) *pointer<int64_t>(row.nonfinite) = 1;
}

__device__ inline bool is_stopped(const PatternRow& row) {
  return row.nonfinite != 0 && *pointer<const int64_t>(row.nonfinite) != 0;
}

// The place of a weight among those of its group in the order of the flat index, given that in memory.
class PlaceInGroup {
 public:
  __device__ explicit PlaceInGroup(const PatternRow& row)
      : filter_(row.filter), is_permuted_(row.pattern.is_permuted(row.filter)) {}
  __device__ int64_t operator()(int64_t i) const { return is_permuted_ ? filter_.in_row_major(i) : i; }

 private:
  Filter filter_;
  bool is_permuted_;
};

// Which of eight weights, of which all groups are whole, are neither pruned nor protected.
template <int kOf, typename Key>
__device__ __forceinline__ unsigned eligible_within(const Key (&raw)[kEach], unsigned bits, int keep, Key infinity) {
  Key keys[kEach];
#pragma unroll
  for (int j = 0; j < kEach; ++j) keys[j] = magnitude_key(raw[j], infinity);
  return eligible_in<kOf>(keys, bits, keep);
}

// The same of the eight from `i` on in groups of at most 32 that may lie anywhere.
template <typename Key>
__device__ unsigned eligible_among(const PatternRow& row, int64_t i, unsigned bits, Key infinity) {
  const auto stride = row.pattern.stride();
  const auto of = static_cast<int>(row.pattern.of()), keep = static_cast<int>(row.pattern.keep());
  const PlaceInGroup place_of(row);
  const Key* const source = pointer<const Key>(row.source);
  const uint8_t* const mask = pointer<const uint8_t>(row.mask);
  int64_t column = i % stride;
  int member = static_cast<int>(i / stride % of);
  unsigned eligible = 0;
#pragma unroll 1
  for (int j = 0; j < kEach && bits >> j != 0; ++j) {
    if (bits >> j & 1) {
      const Key own = standing_of(magnitude_key(load1(source + i + j), infinity), true);
      const auto place = static_cast<int>(place_of(member));
      const int64_t first = i + j - member * stride;
      int after = 0;
#pragma unroll 1
      for (int other = 0; other < of; ++other) {
        if (other == member) continue;
        const int64_t at = first + other * stride;
        const Key standing = standing_of(magnitude_key(load1(source + at), infinity), is_kept(mask, at));
        // Of equal weights the first is the last in the order.
        const bool is_before = place_of(other) < place;
        after += is_before ? standing >= own : standing > own;
      }
      eligible |= static_cast<unsigned>(after >= keep) << j;
    }
    if (++column == stride) {
      column = 0;
      member = member + 1 == of ? 0 : member + 1;
    }
  }
  return eligible;
}

// Calls visit(constant) with the size of groups that lie whole in eights, and with 0 for all others.
template <typename Visit>
__device__ __forceinline__ void with_groups(const PatternRow& row, Visit visit) {
  const int64_t of = row.pattern.is_within_eight(row.filter) ? row.pattern.of() : 0;
  if (of == 4) {
    visit(std::integral_constant<int, 4>{});
  } else if (of == 2) {
    visit(std::integral_constant<int, 2>{});
  } else if (of == 8) {
    visit(std::integral_constant<int, 8>{});
  } else {
    visit(std::integral_constant<int, 0>{});
  }
}

// Of layers without a pattern, it only looks for NaN and Inf.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kReaders)
    rank_groups(PatternRow* rows, int64_t num_rows, int64_t num_chunks, Key infinity) {
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    const PatternRow& row = rows[r];
    const auto keep = static_cast<int>(row.pattern.keep());
    bool found_nonfinite = false;
    with_groups(row, [&](auto of) {
      constexpr int kOf = decltype(of)::value;
      for (int chunk = first; chunk < last; ++chunk) {
        const int64_t begin = (chunk - row.first_chunk) * kChunk;
        const Key* const source = pointer<const Key>(row.source) + begin;
        const uint8_t* const mask = row.mask == 0 ? nullptr : pointer<const uint8_t>(row.mask) + begin / 8;
        uint8_t* const ranked = row.ranked == 0 ? nullptr : pointer<uint8_t>(row.ranked) + begin / 8;
        const int size = size_of_chunk(row.n, begin);
        const auto visit = [&](int i, const Key(&raw)[kEach], unsigned bits) {
          found_nonfinite |= holds_nonfinite(raw, bits, infinity);
          if constexpr (kOf > 0) {
            store_bits(ranked, i, eligible_within<kOf>(raw, bits, keep, infinity));
          } else if (ranked != nullptr) {
            store_bits(ranked, i, eligible_among(row, begin + i, bits, infinity));
          }
        };
        if (kOf > 0 && size == kChunk && is_aligned(source)) {
          for_each_eight<true>(source, mask, size, visit);
        } else {
          for_each_eight<false>(source, mask, size, visit);
        }
      }
    });
    report_nonfinite(row, found_nonfinite);
  });
}

// Returns the value of a rank among those of `size` that there are, value_at(index, value), and leaves in `rank` how
// many others tie with it and come before; -1 in `rank` if there are not so many. The whole block must call it.
template <typename ValueAt>
__device__ __forceinline__ uint64_t value_of_rank(int64_t size, int bits, int64_t& rank, ValueAt value_at) {
  constexpr int kDigit = 8;
  __shared__ unsigned counts[1 << kDigit];
  uint64_t found = 0;
  for (int shift = (bits - 1) / kDigit * kDigit; shift >= 0; shift -= kDigit) {
    for (unsigned c = threadIdx.x; c < 1 << kDigit; c += kThreads) counts[c] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      uint64_t value;
      if (value_at(i, value) && value >> shift >> kDigit == found) atomicAdd(&counts[value >> shift & 255], 1u);
    }
    __syncthreads();
    const int64_t digit = find_crossing_of_all(1 << kDigit, rank, [&](int64_t c) { return int64_t{counts[c]}; });
    if (digit < 0) {
      rank = -1;
      return 0;
    }
    found = found << kDigit | static_cast<uint64_t>(digit);
  }
  return found;
}

// Groups of more than 32 weights that lie in a row: a block of threads takes one, which counts as a chunk. The bits are
// zero before, because groups share words of them.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kFewReaders)
    rank_rows(PatternRow* rows, int64_t num_rows, int64_t num_chunks, Key infinity) {
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    const PatternRow& row = rows[r];
    const int64_t of = row.pattern.of();
    const PlaceInGroup place_of(row);
    const uint8_t* const mask = pointer<const uint8_t>(row.mask);
    bool found_nonfinite = false;
    int index_bits = 1;
    while (of >> index_bits != 0) ++index_bits;
    for (int chunk = first; chunk < last; ++chunk) {
      const int64_t begin = (chunk - row.first_chunk) * of;
      const Key* const source = pointer<const Key>(row.source) + begin;
      const auto key_at = [&](int64_t i) { return magnitude_key(load1(source + i), infinity); };
      int64_t rank = row.pattern.keep() - 1;
      // From the largest key on.
      const auto last_key =
          static_cast<Key>(~value_of_rank(of, static_cast<int>(sizeof(Key)) * 8, rank, [&](int64_t i, uint64_t& value) {
            value = static_cast<Key>(~key_at(i));
            return is_kept(mask, begin + i);
          }));
      if (rank < 0) continue;  // all that is there is protected
      const auto last_index = static_cast<int64_t>(value_of_rank(of, index_bits, rank, [&](int64_t i, uint64_t& value) {
        value = static_cast<uint64_t>(place_of(i));
        return is_kept(mask, begin + i) && key_at(i) == last_key;
      }));
      const int64_t end = begin + of;
      for (int64_t i = begin / kEach * kEach + threadIdx.x * kEach; i < end; i += kTile) {
        unsigned eligible = 0;
        for (int64_t at = i < begin ? begin : i; at < i + kEach && at < end; ++at) {
          if (!is_kept(mask, at)) continue;
          const Key key = key_at(at - begin);
          found_nonfinite |= key >= infinity;
          const bool is_protected = key > last_key || (key == last_key && place_of(at - begin) <= last_index);
          eligible |= static_cast<unsigned>(!is_protected) << (at - i);
        }
        const int64_t word = i / 32;
        if (begin <= word * 32 && word * 32 + 32 <= end) {
          store_bits(pointer<uint8_t>(row.ranked), i, eligible);
        } else if (eligible != 0) {
          atomicOr(pointer<unsigned>(row.ranked) + word, eligible << (i % 32));
        }
      }
    }
    report_nonfinite(row, found_nonfinite);
  });
}

// `kRun` weights in a row, in as few loads as possible.
template <int kRun, typename T>
__device__ __forceinline__ void load_run(const T* p, T (&values)[kRun]) {
  struct alignas(kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16) Run {
    T values[kRun];
  };
  simt::count_load(p, static_cast<int64_t>(sizeof(Run)));
  const Run run = *reinterpret_cast<const Run*>(p);
  memcpy(values, run.values, sizeof(values));
}

// The sum of the magnitudes of a block, in row-major order. place(row, column) is that of a weight in memory; kRun
// weights lie side by side there, and are aligned together.
template <int kRun, DType kDType, typename Place>
__device__ __forceinline__ ComputeOf<kDType> sum_of_block(const Stored<kDType>* source, const Pattern& pattern,
                                                          Place place, bool& found_nonfinite) {
  ComputeOf<kDType> sum = 0;
  for (int64_t r = 0; r < pattern.rows(); ++r) {
#pragma unroll 2
    for (int64_t c = 0; c < pattern.cols(); c += kRun) {
      Stored<kDType> values[kRun];
      load_run(source + place(r, c), values);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        const ComputeOf<kDType> value = widened<kDType>(values[j]);
        const ComputeOf<kDType> magnitude = value < 0 ? -value : value;
        found_nonfinite |= !(magnitude <= std::numeric_limits<ComputeOf<kDType>>::max());
        sum += magnitude;
      }
    }
  }
  return sum;
}

// A thread takes a block of weights; a chunk is one for each thread.
template <DType kDType>
__global__ void __launch_bounds__(kThreads) sum_blocks(PatternRow* rows, int64_t num_rows, int64_t num_chunks) {
  constexpr int kRun = 4;
  using T = Stored<kDType>;
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    const PatternRow& row = rows[r];
    const Pattern pattern = row.pattern;
    const T* const source = pointer<const T>(row.source);
    const int64_t width = pattern.width(), across = width / pattern.cols();
    const int64_t num_blocks = row.n / (pattern.rows() * pattern.cols());
    const bool in_runs = row.filter.positions == 1 && pattern.cols() % kRun == 0 &&
                         reinterpret_cast<uint64_t>(source) % (sizeof(T) < 4 ? kRun * sizeof(T) : 16) == 0;
    bool found_nonfinite = false;
    for (int chunk = first; chunk < last; ++chunk) {
      const int64_t b = (chunk - row.first_chunk) * kThreads + threadIdx.x;
      bool is_there = false;
      if (b < num_blocks) {
        const int64_t top = b / across * pattern.rows(), left = b % across * pattern.cols();
        const auto place = [&](int64_t down, int64_t right) { return (top + down) * width + left + right; };
        const auto place_in_filter = [&](int64_t down, int64_t right) {
          return (top + down) * width + row.filter.in_memory(left + right);
        };
        is_there =
            is_kept(pointer<const uint8_t>(row.mask), row.filter.positions == 1 ? place(0, 0) : place_in_filter(0, 0));
        ComputeOf<kDType> sum = 0;
        if (is_there && in_runs) {
          sum = sum_of_block<kRun, kDType>(source, pattern, place, found_nonfinite);
        } else if (is_there && row.filter.positions == 1) {
          sum = sum_of_block<1, kDType>(source, pattern, place, found_nonfinite);
        } else if (is_there) {
          sum = sum_of_block<1, kDType>(source, pattern, place_in_filter, found_nonfinite);
        }
        store1(pointer<ComputeOf<kDType>>(row.sums) + b, sum);
      }
      const unsigned bits = __ballot_sync(~0u, is_there);
      if (threadIdx.x % kEach == 0 && b < num_blocks) {
        store_bits(pointer<uint8_t>(row.ranked), b, bits >> (threadIdx.x % kWarpSize) & 0xff);
      }
    }
    report_nonfinite(row, found_nonfinite);
  });
}

// The cutoff of a layer: the key, and the row-major index from which on ties go.
struct Cutoff {
  uint64_t key;
  int64_t tie_index;

  __device__ explicit Cutoff(const PatternRow& row) : key(row.key), tie_index(row.tie_index) {
    if (row.layer == 0) return;
    const LayerRow& layer = *pointer<const LayerRow>(row.layer);
    key = pointer<const GroupRow>(row.group)->key;
    tie_index = layer.filter.size() > 1 ? layer.tie_index : layer.cut;
  }
};

// Bits of those of eight weights, from `i` on, that come before the tie index.
__device__ inline unsigned bits_before_tie(const PatternRow& row, int64_t tie, int64_t i) {
  const int64_t size = row.filter.size();
  const int64_t from = size == 1 ? tie : tie / size * size;
  unsigned before = (1u << count_from(i, from)) - 1;
  if (size > 1 && i + kEach > from && i < from + size) {
#pragma unroll 1
    for (int j = 0; j < kEach; ++j) {
      const int64_t place = i + j - from;
      if (place < 0 || place >= size) continue;
      before |= static_cast<unsigned>(from + row.filter.in_row_major(place) < tie) << j;
    }
  }
  return before;
}

// A chunk of weights. kMixed: some of them come before the tie index, others do not; else `is_before` is said of all.
template <bool kWhole, int kOf, bool kMixed, typename Key>
__device__ __forceinline__ void settle_chunk(const PatternRow& row, int64_t begin, int size, Cut<Key>& cut,
                                             bool is_before, int64_t tie, Key infinity) {
  const auto keep = static_cast<int>(row.pattern.keep());
  const Key* const source = pointer<const Key>(row.source) + begin;
  const uint8_t* const mask = row.mask == 0 ? nullptr : pointer<const uint8_t>(row.mask) + begin / 8;
  const uint8_t* const ranked = row.ranked == 0 ? nullptr : pointer<const uint8_t>(row.ranked) + begin / 8;
  Key* const weights = row.weights == 0 ? nullptr : pointer<Key>(row.weights) + begin;
  uint8_t* const out = pointer<uint8_t>(row.out) + begin / 8;
  const Key least_of_all = is_before ? cut.before : cut.after;
  for_each_eight<kWhole>(source, mask, size, [&](int i, Key(&raw)[kEach], unsigned bits) {
    unsigned stays;
    if constexpr (kOf > 0) {
      stays = ~eligible_within<kOf>(raw, bits, keep, infinity);
    } else {
      stays = ~load_bits(ranked, i, count_from(i, size));
    }
    const unsigned before = kMixed ? bits_before_tie(row, tie, begin + i) : 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const Key least = !kMixed ? least_of_all : before >> j & 1 ? cut.before : cut.after;
      stays |= static_cast<unsigned>(magnitude_bits(raw[j]) >= least) << j;
    }
    cut.kept_before += __popc(bits);
    bits &= stays;
    cut.kept_now += __popc(bits);
    const bool changed = zero_eight(raw, bits) && weights != nullptr;
    if (changed) store8<kWhole>(weights + i, kWhole ? kEach : count_from(i, size), raw);
    store_bits(out, i, bits);
  });
}

// Adds to the answer of a row what the threads of a block have counted.
template <typename Key>
__device__ void add_kept(PatternRow& row, const Cut<Key>& cut) {
  const unsigned before = block_sum(cut.kept_before), now = block_sum(cut.kept_now);
  if (threadIdx.x != 0) return;
  atomicAdd(counter_at(&row.kept_before), static_cast<unsigned long long>(before));
  atomicAdd(counter_at(&row.kept), static_cast<unsigned long long>(now));
}

// Weights that are ranked one by one.
template <typename Key>
__global__ void __launch_bounds__(kThreads, kFewReaders)
    settle(PatternRow* rows, int64_t num_rows, int64_t num_chunks, Key infinity) {
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    PatternRow& row = rows[r];
    if (is_stopped(row)) return;
    const Cutoff cutoff(row);
    Cut<Key> cut(cutoff.key, infinity);
    const int64_t tie_begin = cutoff.tie_index / row.filter.size() * row.filter.size();
    with_groups(row, [&](auto of) {
      constexpr int kOf = decltype(of)::value;
      for (int chunk = first; chunk < last; ++chunk) {
        const int64_t begin = (chunk - row.first_chunk) * kChunk;
        const int size = size_of_chunk(row.n, begin);
        const bool holds_tie = tie_begin < begin + size && begin < tie_begin + row.filter.size();
        const bool is_before = begin < tie_begin;
        if (holds_tie) {
          settle_chunk<false, kOf, true>(row, begin, size, cut, is_before, cutoff.tie_index, infinity);
        } else if (size == kChunk && is_aligned(pointer<const Key>(row.source) + begin)) {
          settle_chunk<true, kOf, false>(row, begin, size, cut, is_before, cutoff.tie_index, infinity);
        } else {
          settle_chunk<false, kOf, false>(row, begin, size, cut, is_before, cutoff.tie_index, infinity);
        }
      }
    });
    add_kept(row, cut);
  });
}

// Weights that are ranked in blocks. Writes only bits.
template <typename Key>
__global__ void __launch_bounds__(kThreads)
    settle_blocks(PatternRow* rows, int64_t num_rows, int64_t num_chunks, Key infinity) {
  for_each_run(rows, num_rows, num_chunks, [&](int r, int first, int last) {
    PatternRow& row = rows[r];
    if (is_stopped(row)) return;
    const Cutoff cutoff(row);
    Cut<Key> cut(cutoff.key, infinity);
    const Pattern pattern = row.pattern;
    const int64_t width = pattern.width(), across = width / pattern.cols();
    const int64_t end = (last - row.first_chunk) * kChunk < row.n ? (last - row.first_chunk) * kChunk : row.n;
    for (int64_t i = (first - row.first_chunk) * kChunk + threadIdx.x * kEach; i < end; i += kTile) {
      unsigned bits = load_bits(pointer<const uint8_t>(row.mask), i, count_from(i, row.n));
      cut.kept_before += __popc(bits);
      int64_t down = i / width, right = i % width;
      int64_t latest = -1;
      unsigned stays = 0;  // does the latest block
      for (int j = 0; j < kEach && bits >> j != 0; ++j) {
        const int64_t column = row.filter.positions == 1 ? right : row.filter.in_row_major(right);
        const int64_t b = down / pattern.rows() * across + column / pattern.cols();
        if (b != latest) {
          const Key key = magnitude_bits(load1(pointer<const Key>(row.sums) + b));
          stays = key >= (b < cutoff.tie_index ? cut.before : cut.after);
          latest = b;
        }
        bits &= ~((1u - stays) << j);
        if (++right == width) {
          right = 0;
          ++down;
        }
      }
      cut.kept_now += __popc(bits);
      store_bits(pointer<uint8_t>(row.out), i, bits);
    }
    add_kept(row, cut);
  });
}

}  // namespace gmp::cuda::kernels
