// Keys counted against a bracket, by a block, a chunk of one layer after another.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace gmp::cuda::kernels {

inline constexpr int64_t kNoIndex = INT64_MAX;
inline constexpr int64_t kMostBins = 2048;  // that a block counts in

// Keys in registers: those of 16 bits take 32. kNone stands for a weight that is pruned already, or not there: it is
// larger than every key, and smaller as a signed integer.
template <typename Key>
using Word = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;
template <typename Key>
inline constexpr Word<Key> kNone = static_cast<Word<Key>>(~Word<Key>{0});

// Keys of eight weights of which `bits` says which count. NaNs still differ here.
template <typename Key>
__device__ __forceinline__ void keys_of(const Key (&raw)[kEach], unsigned bits, Word<Key>* keys) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const Word<Key> key = magnitude_bits(raw[j]);
    keys[j] = bits >> j & 1 ? key : kNone<Key>;
  }
}

// What the threads of a block share.
template <typename Key>
struct Counts {
  unsigned bins[kMostBins];
  Key staged[kListCapacity];
  unsigned appended[2];  // in turn, so that one can be set back while the other is in use
  unsigned num_staged;   // where the chunk's keys do not fit
};

// What each thread has found.
template <typename Key>
class Counter {
 public:
  using Signed = std::make_signed_t<Word<Key>>;

  // The whole block comes here, and to every function below but take(), which needs whole warps.
  __device__ Counter(Counts<Key>& shared, int64_t capacity, Key infinity)
      : shared_(shared), capacity_(static_cast<unsigned>(capacity)), infinity_(infinity) {
    for (int64_t b = threadIdx.x; b < kMostBins; b += kThreads) shared_.bins[b] = 0;
    if (threadIdx.x < 2) shared_.appended[threadIdx.x] = 0;
    __syncthreads();
  }

  __device__ void aim(uint64_t lo, uint64_t hi, int64_t shift) {
    lo_ = static_cast<Word<Key>>(lo);
    // Above every number all NaN are alike, whatever their bits.
    last_ = static_cast<Word<Key>>(hi > infinity_ ? static_cast<Key>(~kSignBit<Key>) : hi);
    size_ = lo_ <= last_ ? last_ - lo_ + 1 : 0;
    shift_ = static_cast<int>(shift);
    below = pruned = 0;
  }

  // Keys of eights that are a tile apart, the first of them beginning at index i; bit k of `present` says whether the
  // k-th is one. The few that are needed again come from load(k): indices that vary would take the keys out of their
  // registers. Those inside for which there is no room are counted at once, and go to spill(key).
  template <int kCount, typename Load, typename Spill>
  __device__ __forceinline__ void take(const Word<Key> (&keys)[kCount], unsigned present, int64_t i, Load load,
                                       Spill spill) {
    constexpr int kTopBit = sizeof(Word<Key>) * 8 - 1;
    unsigned inside = 0;
    Signed top = -1;
    below += count_bits(present) - kCount;  // kNone looks like a key below
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Word<Key> above_lo = keys[k] - lo_;
      below += static_cast<unsigned>(above_lo >> kTopBit);
      inside |= above_lo < size_ ? 1u << k : 0u;
      top = static_cast<Signed>(keys[k]) > top ? static_cast<Signed>(keys[k]) : top;
    }
    if (top >= static_cast<Signed>(infinity_)) {
      for (unsigned left = present; left != 0; left &= left - 1) {
        const int k = lowest_bit(left);
        const int64_t index = i + k / kEach * kTile + k % kEach;
        if (magnitude_key(load(k), infinity_) >= infinity_ && index < nonfinite_) nonfinite_ = index;
      }
    }
    const unsigned lane = threadIdx.x % kWarpSize, mine = count_bits(inside);
    unsigned until = mine;
#pragma unroll
    for (unsigned step = 1; step < kWarpSize; step *= 2) {
      const unsigned lower = __shfl_up_sync(~0u, until, step);
      if (lane >= step) until += lower;
    }
    const unsigned total = __shfl_sync(~0u, until, kWarpSize - 1);
    if (total == 0) return;
    unsigned base = 0;
    if (lane == 0) base = atomicAdd(&shared_.appended[turn_], total);
    base = __shfl_sync(~0u, base, 0);
    if (base + total <= capacity_) {
      unsigned place = base + until - mine;
      for (; inside != 0; inside &= inside - 1) {
        shared_.staged[place++] = magnitude_key(load(lowest_bit(inside)), infinity_);
      }
    } else {
      if (lane == 0 && base <= capacity_) shared_.num_staged = base;
      for (; inside != 0; inside &= inside - 1) {
        const Key key = magnitude_key(load(lowest_bit(inside)), infinity_);
        add(key);
        spill(key);
      }
    }
  }

  // Whether the key is not above the bracket; kNone is.
  __device__ bool is_at_most_last(Word<Key> key) const { return key <= last_; }

  // Counts a key that was in a list, if it is inside.
  __device__ void take_listed(Key key) {
    if (is_inside(key)) add(key);
  }

  // Puts the first NaN or Inf that this thread has seen where the smallest index is kept; returns whether there was
  // one.
  __device__ bool report_nonfinite(int64_t* first) {
    if (nonfinite_ == kNoIndex) return false;
    atomicMin(counter_at(first), static_cast<unsigned long long>(nonfinite_));
    nonfinite_ = kNoIndex;
    return true;
  }

  // Counts the other keys inside of one chunk and hands them to store(position, key); returns how many were inside.
  template <typename Store>
  __device__ __forceinline__ unsigned end_chunk(Store store) {
    __syncthreads();
    const unsigned appended = shared_.appended[turn_];
    const unsigned size = appended <= capacity_ ? appended : shared_.num_staged;
    for (unsigned k = threadIdx.x; k < size; k += kThreads) {
      const Key key = shared_.staged[k];
      add(key);
      store(k, key);
    }
    turn_ ^= 1;
    if (threadIdx.x == 0) shared_.appended[turn_] = 0;
    __syncthreads();  // the staged keys are overwritten next
    return appended;
  }

  // Gives a bin of the block, and empties it.
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

  // Of this thread since aim(). A block would have to take 10^12 weights for more.
  unsigned below = 0, pruned = 0;

 private:
  __device__ bool is_inside(Word<Key> key) const { return static_cast<Word<Key>>(key - lo_) < size_; }
  __device__ void add(Key key) { atomicAdd(&shared_.bins[static_cast<Word<Key>>(key - lo_) >> shift_], 1u); }

  Counts<Key>& shared_;
  const unsigned capacity_;
  const Key infinity_;
  Word<Key> lo_ = 0, last_ = 0, size_ = 0;
  int shift_ = 0;
  unsigned turn_ = 0;
  int64_t nonfinite_ = kNoIndex;
};

// One chunk of weights. kWhole: see load8.
//
// `touched`, if given, receives a bit per eight weights of a layer with a mask: whether apply can have anything to do
// there. That is so where an unpruned key is not above the bracket, or where something other than +0 lies under a
// pruned bit; so here dead eights are looked at too. It is never too few: the threshold is a key of the bracket of the
// last read, because a bracket is moved only by reading all weights again, which writes all bits again, and from then
// on becomes only narrower; all layers of a group are read against one bracket; a layer that has enough pruned already
// gets a threshold of 0, below which is nothing; above Inf, where all NaN tie, the bracket ends at the last of them.
template <bool kWhole, bool kMasked, typename Key, typename Spill>
__device__ __forceinline__ void count_chunk(const Key* weights, const uint8_t* mask, unsigned* touched, int64_t n,
                                            int64_t begin, int64_t end, Counter<Key>& counter, Spill spill) {
  constexpr int kEights = sizeof(Key) == 8 ? 1 : 2;  // two to four loads of 16 bytes are under way
  for (int64_t tile = begin; tile < end; tile += kEights * kTile) {
    const int64_t first = tile + threadIdx.x * kEach;
    Key raw[kEights][kEach];
    unsigned present = 0;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int64_t i = first + e * kTile;
      const int size = kWhole ? kEach : count_from(i, n);
      const unsigned bits = kMasked ? load_bits(mask, i, size) : (1u << size) - 1;
      if (kMasked) counter.pruned += size - count_bits(bits);
      load8<kWhole>(weights + i, bits != 0 || (kMasked && touched != nullptr) ? size : 0, raw[e]);
      present |= bits << e * kEach;
    }
    Word<Key> keys[kEights * kEach];
#pragma unroll
    for (int e = 0; e < kEights; ++e) keys_of(raw[e], present >> e * kEach, keys + e * kEach);
    if (kMasked && touched != nullptr) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const int64_t i = first + e * kTile;
        Key garbage = 0;
        bool may_go = false;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          garbage |= present >> (e * kEach + j) & 1 ? Key(0) : raw[e][j];
          may_go |= counter.is_at_most_last(keys[e * kEach + j]);
        }
        const unsigned word = __ballot_sync(~0u, garbage != 0 || may_go);
        if (threadIdx.x % kWarpSize == 0 && (kWhole || i < n)) store1(touched + i / kTouchedBy, word);
      }
    }
    const Key* const again = weights + first;
    counter.take(keys, present, first, [&](int k) { return reload1(again + (k / kEach * kTile + k % kEach)); }, spill);
  }
}

template <typename Key, typename Spill>
__device__ __forceinline__ void count_chunk(uint64_t weights, uint64_t mask, uint64_t touched, int64_t n, int64_t begin,
                                            int64_t end, Counter<Key>& counter, Spill spill) {
  const Key* const w = pointer<const Key>(weights);
  const uint8_t* const bits = pointer<const uint8_t>(mask);
  unsigned* const t = pointer<unsigned>(touched);
  if (!is_whole(w, begin, end)) return count_chunk<false, true>(w, bits, t, n, begin, end, counter, spill);
  if (bits == nullptr) return count_chunk<true, false>(w, bits, t, n, begin, end, counter, spill);
  count_chunk<true, true>(w, bits, t, n, begin, end, counter, spill);
}

}  // namespace gmp::cuda::kernels
