// Comparisons of all the keys that a thread holds with the same key, answered by one bit each in one word: what is done
// with the answers costs the same for one as for all.
//
// A key with its sign bit set, less another key, keeps that bit if it is no smaller. Keys of 16 bits are compared two
// to a register: neither half borrows from the other. Bit k of a word is about the k-th key, but for 16 bits: there the
// even keys come first.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace gmp::cuda::answers {

template <typename Key>
inline constexpr bool kPaired = sizeof(Key) == 2;
template <typename Key>
using Operand = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;

template <typename Key>
inline constexpr int kEights = sizeof(Key) == 8 ? 1 : 8 / sizeof(Key);  // four loads of 16 bytes, at most
template <typename Key>
inline constexpr int kOperands = kEights<Key> * kEach / (kPaired<Key> ? 2 : 1);
template <typename Key>
inline constexpr Operand<Key> kSigns = kPaired<Key> ? 0x80008000u : Operand<Key>{1} << (sizeof(Operand<Key>) * 8 - 1);

template <typename Key>
__device__ __forceinline__ Operand<Key> all(Operand<Key> key) {
  return kPaired<Key> ? key << 16 | key : key;
}
template <typename Key>
__device__ __forceinline__ Operand<Key> guarded(Operand<Key> raw) {
  return raw | kSigns<Key>;
}

// Shifts the sign bit into the word. Written out, shifts like these keep nvcc busy for ever.
template <typename Word>
__device__ __forceinline__ void push(unsigned& answers, Word signs) {
  answers = __funnelshift_l(static_cast<unsigned>(signs >> (sizeof(Word) * 8 - 32)), answers, 1);
}

// Asks is_so(operand), which answers by sign bits, for every operand.
template <typename Key, typename IsSo>
__device__ __forceinline__ unsigned ask(const Operand<Key> (&operands)[kOperands<Key>], IsSo is_so) {
  unsigned answers = 0;
#pragma unroll
  for (int step = 0; step < kOperands<Key>; ++step) {
    if (kPaired<Key>) {
      answers = answers >> 1 | static_cast<unsigned>(is_so(operands[step]) & kSigns<Key>);
    } else {
      push(answers, is_so(operands[kOperands<Key> - 1 - step]));
    }
  }
  return answers;
}

template <typename Key>
__device__ __forceinline__ int key_of(int bit) {
  return kPaired<Key> ? bit % 16 * 2 + bit / 16 : bit;
}

// A bit for each key, in the order of the keys, put into that of the answers.
template <typename Key>
__device__ __forceinline__ unsigned arranged(unsigned bits) {
  if (!kPaired<Key>) return bits;
  const auto swap = [&](unsigned mask, int shift) {
    const unsigned differing = (bits ^ bits >> shift) & mask;
    bits ^= differing ^ differing << shift;
  };
  swap(0x22222222u, 1);
  swap(0x0c0c0c0cu, 2);
  swap(0x00f000f0u, 4);
  swap(0x0000ff00u, 8);
  return bits;
}

// Those of the e-th eight.
template <typename Key>
__device__ __forceinline__ unsigned of_eight(unsigned answers, int e) {
  return kPaired<Key> ? answers >> e * 4 & 0x000f000fu : answers >> e * kEach & 0xffu;
}

}  // namespace gmp::cuda::answers
