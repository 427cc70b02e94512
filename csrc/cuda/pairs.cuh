// Keys of 16 bits, two to a register: one subtraction compares both.
#pragma once

#include "device.cuh"

namespace gmp::cuda {

inline constexpr int kPairs = 16;  // that are compared together: 32 keys, whose answers are the bits of one word
inline constexpr int kPairEights = 2 * kPairs / kEach;
inline constexpr unsigned kSigns = 0x80008000u;  // of both

// Two keys with their sign bits set: less a key each, neither half borrows from the other, and its sign bit stays set
// if it is no smaller.
__device__ __forceinline__ unsigned guarded(unsigned raw) { return raw | kSigns; }
__device__ __forceinline__ unsigned both(unsigned key) { return key << 16 | key; }

// Answers for kPairs pairs, one pair after the other, from the sign bits of its halves. Those of pair p end as bits p
// and 16 + p.
__device__ __forceinline__ void add_answers(unsigned& answers, unsigned signs) {
  answers = answers >> 1 | (signs & kSigns);
}

// Which of the 32 keys has its answer in this bit.
__device__ __forceinline__ int key_of_answer(int bit) { return bit % kPairs * 2 + bit / kPairs; }

// A bit for each key, in their order, as answers are: the even ones first.
__device__ __forceinline__ unsigned as_answers(unsigned bits) {
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

// Of the answers, those of the e-th eight.
__device__ __forceinline__ unsigned answers_of_eight(unsigned answers, int e) {
  constexpr int kPairsOfEight = kEach / 2;
  return answers >> e * kPairsOfEight & both((1u << kPairsOfEight) - 1);
}

}  // namespace gmp::cuda
