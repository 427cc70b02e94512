// Keys counted against a bracket, by a block, a chunk of one layer after another.
#pragma once

#include <type_traits>

#include "pairs.cuh"

namespace gmp::cuda::kernels {

inline constexpr int64_t kNoIndex = INT64_MAX;
inline constexpr int64_t kMostBins = 2048;     // that a block counts in
inline constexpr unsigned kMostCounted = 384;  // keys with a counter of their own: see Counter::aim
static_assert(kMostCounted <= kBins && kMostCounted <= kListCapacity);

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
  // Of one chunk while the next is read already; of three in turn, one can be set back while two are in use.
  union {
    Key staged[2][kListCapacity];
    unsigned each[2][kMostCounted];
  };
  unsigned num_staged[2];  // where the chunk's keys do not fit
  unsigned appended[3];
};

// What each thread has found.
template <typename Key>
class Counter {
 public:
  using Signed = std::make_signed_t<Word<Key>>;

  // The whole block comes here, to aim(), to end_chunk() and to move_bins().
  __device__ Counter(Counts<Key>& shared, int64_t capacity, Key infinity)
      : shared_(shared), capacity_(static_cast<unsigned>(capacity)), infinity_(infinity) {
    for (int64_t b = threadIdx.x; b < kMostBins; b += kThreads) shared_.bins[b] = 0;
    if (threadIdx.x < 3) shared_.appended[threadIdx.x] = 0;
    __syncthreads();
  }

  // With `may_count_each`, lists hold how often each key of the bracket is there, instead of keys, where it is narrow
  // enough for that: of 16-bit keys so many are alike that lists of them overflow.
  __device__ void aim(uint64_t lo, uint64_t hi, int64_t shift, bool may_count_each) {
    lo_ = static_cast<Word<Key>>(lo);
    // Above every number all NaN are alike, whatever their bits.
    const uint64_t last = hi > infinity_ ? static_cast<Key>(~kSignBit<Key>) : hi;
    size_ = static_cast<Word<Key>>(lo <= last ? last - lo + 1 : 0);
    shift_ = static_cast<int>(shift);
    below = pruned = 0;
    counts_each_ = may_count_each && shift == 0 && size_ <= capacity_ && size_ <= kMostCounted;
    if (counts_each()) {
      for (unsigned b = threadIdx.x; b < kMostCounted; b += kThreads) shared_.each[0][b] = shared_.each[1][b] = 0;
      __syncthreads();
    }
  }

  __device__ bool counts_each() const { return sizeof(Key) == 2 && counts_each_; }

  // Keys of eights that are a tile apart, the first of them beginning at index i of the chunk; bit k of `present` says
  // whether the k-th is one. The few that are needed again come from load(k): indices that vary would take the keys out
  // of their registers. Those inside for which there is no room are counted at once, and go to spill(key).
  template <int kCount, typename Load, typename Spill>
  __device__ __forceinline__ void take(const Word<Key> (&keys)[kCount], unsigned present, int i, Load load,
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
    if (top >= static_cast<Signed>(infinity_)) find_nonfinite(present, i, load);
    append(inside, load, spill);
  }

  // The same for 32 keys of 16 bits, two to a word. Returns which of them are present and not above the bracket; as all
  // that has a bit for each key here, in the order of answers (see pairs.cuh).
  template <typename Load, typename Spill>
  __device__ __forceinline__ unsigned take_pairs(const unsigned (&pairs)[kPairs], unsigned present, int i, Load load,
                                                 Spill spill) {
    const unsigned lo = both(lo_), past = both(lo_ + size_), infinity = both(infinity_);
    unsigned reach_lo = 0, reach_past = 0, reach_infinity = 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const unsigned keys = guarded(pairs[p]);
      add_answers(reach_lo, keys - lo);
      add_answers(reach_past, keys - past);
      reach_infinity |= keys - infinity;  // of no use but to say whether there is any
    }
    below += count_bits(present & ~reach_lo);
    const auto load_answer = [&](int bit) { return load(key_of_answer(bit)); };
    if ((reach_infinity & kSigns) != 0) {
      for (unsigned left = present; left != 0; left &= left - 1)
        look_for_nonfinite(key_of_answer(lowest_bit(left)), i, load);
    }
    append(present & reach_lo & ~reach_past, load_answer, spill);
    return present & ~reach_past;
  }

  // Whether the key is not above the bracket, which is not empty; kNone is.
  __device__ bool is_not_above(Word<Key> key) const { return key < lo_ + size_; }

  // Counts a key that was in a list, if it is inside.
  __device__ void take_listed(Key key) {
    if (is_inside(key)) add(key);
  }

  // Puts the first NaN or Inf that this thread has seen in the chunk that begins at `begin` where the smallest index is
  // kept; returns whether there was one.
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
    __syncthreads();  // all of the chunk's keys are there; and those of the chunk before are done with
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

  template <typename Load>
  __device__ void look_for_nonfinite(int k, int i, Load load) {
    const int index = i + k / kEach * static_cast<int>(kTile) + k % kEach;
    if (magnitude_key(load(k), infinity_) >= infinity_ && index < nonfinite_) nonfinite_ = index;
  }
  template <typename Load>
  __device__ void find_nonfinite(unsigned present, int i, Load load) {
    for (unsigned left = present; left != 0; left &= left - 1) look_for_nonfinite(lowest_bit(left), i, load);
  }

  // Takes the keys inside: load(bit) for each bit that is set.
  template <typename Load, typename Spill>
  __device__ __forceinline__ void append(unsigned inside, Load load, Spill spill) {
    if (inside == 0) return;
    if (counts_each()) {
      for (; inside != 0; inside &= inside - 1) {
        const Key key = magnitude_key(load(lowest_bit(inside)), infinity_);
        atomicAdd(&shared_.each[half_][static_cast<Word<Key>>(key - lo_)], 1u);
      }
      return;
    }
    // In no order: the lists are used as sets.
    const unsigned mine = count_bits(inside), base = atomicAdd(&shared_.appended[third_], mine);
    if (base + mine <= capacity_) {
      unsigned place = base;
      for (; inside != 0; inside &= inside - 1) {
        shared_.staged[half_][place++] = magnitude_key(load(lowest_bit(inside)), infinity_);
      }
    } else {
      if (base <= capacity_) shared_.num_staged[half_] = base;
      for (; inside != 0; inside &= inside - 1) {
        const Key key = magnitude_key(load(lowest_bit(inside)), infinity_);
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
  Word<Key> lo_ = 0, size_ = 0;
  int shift_ = 0;
  bool counts_each_ = false;
  unsigned half_ = 0, third_ = 0;  // of what is shared, for the chunk that is read
  int nonfinite_ = kNowhere;       // index in the chunk
};

// Which eights of a layer with a mask apply can have anything to do in: a bit each, in `touched`. That is so where an
// unpruned key is not above the bracket, or where something other than +0 lies under a pruned bit; so here dead eights
// are looked at too. It is never too few: the threshold is a key of the bracket of the last read, because a bracket is
// moved only by reading all weights again, which writes all bits again, and from then on becomes only narrower; all
// layers of a group are read against one bracket; a layer that has enough pruned already gets a threshold of 0, below
// which is nothing; above Inf, where all NaN tie, the bracket ends at the last of them.
enum class Flags { none, written };

template <bool kWhole>
__device__ __forceinline__ void write_flag(unsigned* touched, int i, int size, bool flag) {
  const unsigned word = __ballot_sync(~0u, flag);
  if (threadIdx.x % kWarpSize == 0 && (kWhole || i < size)) store1(touched + i / kTouchedBy, word);
}

// One chunk of weights. kWhole: see load8. With flags, weights are asked for before it is known whether any of an eight
// is left: most are, and the loads of bits and weights are under way together.
template <bool kWhole, bool kMasked, Flags kFlags, typename Key, typename Spill>
__device__ __forceinline__ void count_chunk(const Key* weights, const uint8_t* mask, unsigned* touched, int size,
                                            Counter<Key>& counter, Spill spill) {
  constexpr bool kPaired = sizeof(Key) == 2;
  constexpr int kEights = kPaired ? kPairEights : sizeof(Key) == 8 ? 1 : 2;
  for (int tile = 0; tile < size; tile += kEights * static_cast<int>(kTile)) {
    const int first = tile + static_cast<int>(threadIdx.x) * kEach;
    const auto index = [&](int e) { return first + e * static_cast<int>(kTile); };
    const Key* const again = weights + first;
    const auto load = [&](int k) { return again[k / kEach * kTile + k % kEach]; };
    Key raw[kEights][kEach] = {};
    unsigned present = 0;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int there = kWhole ? kEach : count_from(index(e), size);
      const unsigned bits = kMasked ? load_bits(mask, index(e), there) : (1u << there) - 1;
      if (kMasked) counter.pruned += there - count_bits(bits);
      load8<kWhole>(weights + index(e), kFlags == Flags::written || bits != 0 ? there : 0, raw[e]);
      present |= bits << e * kEach;
    }
    if constexpr (kPaired) {
      unsigned pairs[kPairs];
      memcpy(pairs, raw, sizeof(pairs));
      if (kMasked) present = as_answers(present);
      const unsigned not_above = counter.take_pairs(pairs, present, first, load, spill);
      if (kFlags == Flags::none) continue;
      unsigned something = 0;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) add_answers(something, (guarded(pairs[p]) - both(1)) | pairs[p]);
      something = not_above | (something & ~present);
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        write_flag<kWhole>(touched, index(e), size, answers_of_eight(something, e) != 0);
      }
    } else {
      Word<Key> keys[kEights * kEach];
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        keys_of(raw[e], present >> e * kEach, keys + e * kEach);
        if (kFlags == Flags::none) continue;
        Key garbage = 0;
        Word<Key> least = kNone<Key>;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          garbage |= present >> (e * kEach + j) & 1 ? Key(0) : raw[e][j];
          least = keys[e * kEach + j] < least ? keys[e * kEach + j] : least;
        }
        write_flag<kWhole>(touched, index(e), size, garbage != 0 || counter.is_not_above(least));
      }
      counter.take(keys, present, first, load, spill);
    }
  }
}

// The chunk that begins at `begin` in a layer of n weights.
template <typename Key, typename Spill>
__device__ __forceinline__ void count_chunk(uint64_t weights, uint64_t mask, uint64_t touched, int64_t n, int64_t begin,
                                            Counter<Key>& counter, Spill spill) {
  const Key* const w = pointer<const Key>(weights) + begin;
  const uint8_t* const bits = mask == 0 ? nullptr : pointer<const uint8_t>(mask) + begin / 8;
  unsigned* const t = touched == 0 ? nullptr : pointer<unsigned>(touched) + begin / kTouchedBy;
  const int size = size_of_chunk(n, begin);
  const bool whole = size == kChunk && is_aligned(w);
  if (bits == nullptr && whole) return count_chunk<true, false, Flags::none>(w, bits, t, size, counter, spill);
  if (t == nullptr && whole) return count_chunk<true, true, Flags::none>(w, bits, t, size, counter, spill);
  if (t == nullptr) return count_chunk<false, true, Flags::none>(w, bits, t, size, counter, spill);
  if (whole) return count_chunk<true, true, Flags::written>(w, bits, t, size, counter, spill);
  count_chunk<false, true, Flags::written>(w, bits, t, size, counter, spill);
}

}  // namespace gmp::cuda::kernels
