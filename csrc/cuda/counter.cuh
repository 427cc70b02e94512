// Counting of keys against a bracket by a block, chunk by chunk of one layer.
#pragma once

#include "answers.cuh"

namespace gmp::cuda::kernels {

inline constexpr int64_t kNoIndex = INT64_MAX;
inline constexpr int64_t kMostBins = 2048;     // in which a block counts
inline constexpr unsigned kMostCounted = 384;  // keys with a counter of their own: see Counter::aim
static_assert(kMostCounted <= kBins && kMostCounted <= kListCapacity);

// Memory that the threads of a block share.
template <typename Key>
struct Counts {
  unsigned bins[kMostBins];
  // Two sets, because the next chunk may be read already. Of three numbers, one can be reset while two are in use.
  union {
    Key staged[2][kListCapacity];
    unsigned each[2][kMostCounted];
  };
  unsigned num_staged[2];  // where the chunk's keys do not fit
  unsigned appended[3];
};

// Results of each thread.
template <typename Key>
class Counter {
 public:
  using Word = answers::Operand<Key>;

  // The whole block must call this, aim(), end_chunk(), add_sums() and move_bins().
  __device__ Counter(Counts<Key>& shared, int64_t capacity, Key infinity)
      : shared_(shared), capacity_(static_cast<unsigned>(capacity)), infinity_(infinity) {
    for (int64_t b = threadIdx.x; b < kMostBins; b += kThreads) shared_.bins[b] = 0;
    if (threadIdx.x < 3) shared_.appended[threadIdx.x] = 0;
    __syncthreads();
  }

  // With `may_count_each`, lists hold how often each key of the bracket is there, instead of keys, where it is narrow
  // enough for that: of 16-bit keys so many are alike that lists of them overflow.
  __device__ void aim(uint64_t lo, uint64_t hi, int64_t shift, bool may_count_each) {
    lo_ = static_cast<Word>(lo);
    // Above every number, all NaN are equal, whatever their bits.
    const uint64_t last = hi > infinity_ ? static_cast<Key>(~kSignBit<Key>) : hi;
    size_ = static_cast<Word>(lo <= last ? last - lo + 1 : 0);
    shift_ = static_cast<int>(shift);
    below = pruned = 0;
    counts_each_ = may_count_each && shift == 0 && size_ <= capacity_ && size_ <= kMostCounted;
    if (counts_each()) {
      for (unsigned b = threadIdx.x; b < kMostCounted; b += kThreads) shared_.each[0][b] = shared_.each[1][b] = 0;
      __syncthreads();
    }
  }

  __device__ bool counts_each() const { return sizeof(Key) == 2 && counts_each_; }

  // Keys of eights that are a tile apart, the first of them beginning at index i of the chunk; `present` says, in the
  // order of answers, which of them count. The few that are needed again come from load(k): indices that vary would
  // take the keys out of their registers. Those inside for which there is no room are counted at once, and go to
  // spill(key). Returns which of them are not above the bracket.
  template <typename Load, typename Spill>
  __device__ __forceinline__ unsigned take(const Word (&raw)[answers::kOperands<Key>], unsigned present, int i,
                                           Load load, Spill spill) {
    const Word lo = answers::all<Key>(lo_), past = answers::all<Key>(lo_ + size_),
               infinity = answers::all<Key>(infinity_);
    const unsigned reach_lo = answers::ask<Key>(raw, [&](Word w) { return answers::guarded<Key>(w) - lo; });
    const unsigned reach_past = answers::ask<Key>(raw, [&](Word w) { return answers::guarded<Key>(w) - past; });
    Word reach_infinity = 0;  // it says only whether any does
#pragma unroll
    for (const Word w : raw) reach_infinity |= answers::guarded<Key>(w) - infinity;
    below += __popc(present & ~reach_lo);
    if ((reach_infinity & answers::kSigns<Key>) != 0) find_nonfinite(present, i, load);
    append(present & reach_lo & ~reach_past, load, spill);
    return present & ~reach_past;
  }

  // Counts a key that was in a list, if it is inside.
  __device__ void take_listed(Key key) {
    if (is_inside(key)) add(key);
  }

  // Lowers the smallest index to that of the first NaN or Inf that this thread has seen in the chunk that begins at
  // `begin`; returns whether there was one.
  __device__ bool report_nonfinite(int64_t* first, int64_t begin) {
    if (nonfinite_ == kNowhere) return false;
    atomicMin(counter_at(first), static_cast<unsigned long long>(begin + nonfinite_));
    nonfinite_ = kNowhere;
    return true;
  }

  // Counts the other keys inside of one chunk and hands them to store(position, key); returns how many were inside. If
  // each key is counted, positions are keys less the bracket's first one, and what is stored is how often they were
  // there; 0 is returned. The next chunk may be begun by some threads while others are still here.
  template <typename Store>
  __device__ __forceinline__ unsigned end_chunk(Store store) {
    __syncthreads();  // all keys of the chunk are there, and those of the chunk before are no longer needed
    const unsigned appended = shared_.appended[third_];
    if (counts_each()) {
      for (unsigned b = threadIdx.x; b < size_; b += kThreads) {
        const unsigned count = shared_.each[half_][b];
        shared_.each[half_][b] = 0;
        shared_.bins[b] += count;
        store(b, static_cast<Key>(count));
      }
    } else {
      const unsigned size = appended <= capacity_ ? appended : shared_.num_staged[half_];
      for (unsigned k = threadIdx.x; k < size; k += kThreads) {
        const Key key = shared_.staged[half_][k];
        add(key);
        store(k, key);
      }
    }
    half_ ^= 1;
    third_ = next_third(third_);
    if (threadIdx.x == 0) shared_.appended[next_third(third_)] = 0;
    return appended;
  }

  // Returns a bin of the block, and empties it.
  __device__ unsigned take_bin(int64_t bin) {
    const unsigned count = shared_.bins[bin];
    shared_.bins[bin] = 0;
    return count;
  }

  // Adds the bins of the block to others, and empties them.
  template <typename Bin>
  __device__ void move_bins(Bin* bins, int64_t num_bins) {
    for (int64_t b = threadIdx.x; b < num_bins; b += kThreads) {
      if (shared_.bins[b] != 0) atomicAdd(&bins[b], static_cast<Bin>(shared_.bins[b]));
      shared_.bins[b] = 0;
    }
  }

  // Adds the counts of the block since aim() to a row.
  template <typename Row>
  __device__ void add_sums(Row& row) const {
    const auto sum_below = block_sum(static_cast<unsigned long long>(below));
    const auto sum_pruned = block_sum(static_cast<unsigned long long>(pruned));
    if (threadIdx.x > 0) return;
    atomicAdd(counter_at(&row.below), sum_below);
    atomicAdd(counter_at(&row.pruned), sum_pruned);
  }

  // Counts of this thread since aim(). They would overflow only if a block took 10^12 weights.
  unsigned below = 0, pruned = 0;

 private:
  __device__ bool is_inside(Word key) const { return static_cast<Word>(key - lo_) < size_; }
  __device__ void add(Key key) { atomicAdd(&shared_.bins[static_cast<Word>(key - lo_) >> shift_], 1u); }

  template <typename Load>
  __device__ Key next_key(unsigned inside, Load load) {
    return magnitude_key(load(answers::key_of<Key>(__ffs(inside) - 1)), infinity_);
  }

  template <typename Load>
  __device__ void find_nonfinite(unsigned present, int i, Load load) {
    for (unsigned left = present; left != 0; left &= left - 1) {
      const int k = answers::key_of<Key>(__ffs(left) - 1);
      const int index = i + k / kEach * static_cast<int>(kTile) + k % kEach;
      if (magnitude_key(load(k), infinity_) >= infinity_ && index < nonfinite_) nonfinite_ = index;
    }
  }

  template <typename Load, typename Spill>
  __device__ __forceinline__ void append(unsigned inside, Load load, Spill spill) {
    if (inside == 0) return;
    if (counts_each()) {
      for (; inside != 0; inside &= inside - 1) {
        const Key key = next_key(inside, load);
        atomicAdd(&shared_.each[half_][static_cast<Word>(key - lo_)], 1u);
      }
      return;
    }
    // In any order, because the lists are used as sets.
    const unsigned mine = __popc(inside), base = atomicAdd(&shared_.appended[third_], mine);
    if (base + mine <= capacity_) {
      unsigned place = base;
      for (; inside != 0; inside &= inside - 1) {
        shared_.staged[half_][place++] = next_key(inside, load);
      }
    } else {
      if (base <= capacity_) shared_.num_staged[half_] = base;
      for (; inside != 0; inside &= inside - 1) {
        const Key key = next_key(inside, load);
        add(key);
        spill(key);
      }
    }
  }

  static constexpr int kNowhere = kChunk;
  __device__ static unsigned next_third(unsigned third) { return third == 2 ? 0 : third + 1; }

  Counts<Key>& shared_;
  const unsigned capacity_;
  const Key infinity_;
  Word lo_ = 0, size_ = 0;
  int shift_ = 0;
  bool counts_each_ = false;
  unsigned half_ = 0, third_ = 0;  // of what is shared, for the chunk that is read
  int nonfinite_ = kNowhere;       // index in the chunk
};

// Counts what load_eights has loaded: a strip of which the thread's first weight is at `weights`, and `i` is its index
// in the chunk. What a warp leaves at `touched` is about its first eights, and so on.
//
// `touched`, if given, receives a bit per eight weights of a layer with a mask: whether apply can have anything to do
// there. That is so where an unpruned key is not above the bracket, or where something other than +0 lies under a
// pruned bit. It is never too few: the threshold is a key of the bracket of the last read, because a bracket is moved
// only by reading all weights again, which writes all bits again, and from then on becomes only narrower; all layers of
// a group are read against one bracket; a layer that has enough pruned already gets a threshold of 0, below which is
// nothing; above Inf, where all NaN tie, the bracket ends at the last of them.
template <bool kWhole, bool kMasked, int kEights, typename Key, typename Spill>
__device__ __forceinline__ void count_strip(const Key (&raw)[kEights][kEach], const unsigned (&bits)[kEights],
                                            const Key* weights, unsigned* touched, int i, int size,
                                            Counter<Key>& counter, Spill spill) {
  unsigned present = 0;
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int own = i + e * static_cast<int>(kTile);
    if (kMasked) counter.pruned += (kWhole ? kEach : count_from(own, size)) - __popc(bits[e]);
    present |= bits[e] << e * kEach;
  }
  if (kMasked) present = answers::arranged<Key>(present);
  answers::Operand<Key> operands[answers::kOperands<Key>];
  static_assert(sizeof(operands) == sizeof(raw));
  memcpy(operands, raw, sizeof(operands));
  const auto load = [&](int k) { return weights[k / kEach * kTile + k % kEach]; };
  const unsigned not_above = counter.take(operands, present, i, load, spill);
  if (!kMasked || touched == nullptr) return;
  // A key that is at least 1, or a sign.
  const auto is_something = [](auto word) { return (answers::guarded<Key>(word) - answers::all<Key>(1)) | word; };
  const unsigned something = not_above | (answers::ask<Key>(operands, is_something) & ~present);
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
    const int own = i + e * static_cast<int>(kTile);
    const unsigned word = __ballot_sync(~0u, answers::of_eight<Key>(something, e) != 0);
    if (threadIdx.x % kWarpSize == 0 && (kWhole || own < size)) store1(touched + e * (kTile / kTouchedBy), word);
  }
}

// A chunk of `size` weights. Whole ones (see load8) have each strip under way while the one before is counted, and find
// their first in `next`; behind their last, with `more`, comes the first of the next chunk.
template <bool kWhole, bool kMasked, int kEights, typename Key, typename Spill>
__device__ __forceinline__ void count_chunk(const Key* weights, const uint8_t* mask, unsigned* touched, int size,
                                            bool more, Key (&next)[kEights][kEach], unsigned (&next_bits)[kEights],
                                            Counter<Key>& counter, Spill spill) {
  constexpr int kStep = kEights * static_cast<int>(kTile);
  const int own = static_cast<int>(threadIdx.x) * kEach;
#pragma unroll 1
  for (int tile = 0; tile < size; tile += kStep) {
    const int i = tile + own;
    unsigned* const flags = kMasked && touched != nullptr ? touched + i / kTouchedBy : nullptr;
    if (!kWhole) load_eights<false>(weights, mask, i, size, next, next_bits);
    Key raw[kEights][kEach];
    unsigned bits[kEights];
    memcpy(raw, next, sizeof(raw));
    memcpy(bits, next_bits, sizeof(bits));
    if (kWhole && (more || tile + kStep < size)) {
      load_eights<true>(weights, kMasked ? mask : nullptr, i + kStep, size, next, next_bits);
    }
    count_strip<kWhole, kMasked>(raw, bits, weights + i, flags, i, size, counter, spill);
  }
}

// The chunks from the one that begins at `begin` on, in a layer of n weights; done(c) ends the c-th.
template <typename Key, typename Spill, typename Done>
__device__ __forceinline__ void count_chunks(uint64_t weights, uint64_t mask_address, uint64_t touched, int64_t n,
                                             int64_t begin, int num_chunks, Counter<Key>& counter, Spill spill,
                                             Done done) {
  const Key* const w = pointer<const Key>(weights) + begin;
  const uint8_t* const bits = mask_address == 0 ? nullptr : pointer<const uint8_t>(mask_address) + begin / 8;
  unsigned* const t = touched == 0 ? nullptr : pointer<unsigned>(touched) + begin / kTouchedBy;
  const bool aligned = is_aligned(w);
  Key next[answers::kEights<Key>][kEach];
  unsigned next_bits[answers::kEights<Key>];
  if (aligned && n - begin >= kChunk) {
    load_eights<true>(w, bits, static_cast<int>(threadIdx.x) * kEach, kChunk, next, next_bits);
  }
  for (int c = 0; c < num_chunks; ++c) {
    const int64_t first = c * kChunk, left = n - begin - first;
    const Key* const chunk = w + first;
    const uint8_t* const mask = bits == nullptr ? nullptr : bits + first / 8;
    unsigned* const flags = t == nullptr ? nullptr : t + first / kTouchedBy;
    const bool more = c + 1 < num_chunks && left >= 2 * kChunk;
    if (left < kChunk || !aligned) {
      const int size = size_of_chunk(n, begin + first);
      count_chunk<false, true>(chunk, mask, flags, size, false, next, next_bits, counter, spill);
    } else if (bits == nullptr) {
      count_chunk<true, false>(chunk, mask, flags, kChunk, more, next, next_bits, counter, spill);
    } else {
      count_chunk<true, true>(chunk, mask, flags, kChunk, more, next, next_bits, counter, spill);
    }
    done(c);
  }
}

}  // namespace gmp::cuda::kernels
