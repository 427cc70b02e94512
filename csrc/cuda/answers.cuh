// Comparisons of all keys that a thread holds with one key. The answers are the bits of one word, so that work on them
// costs the same for one key as for all.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace gmp::cuda {

// A key with its sign bit set, minus another key, keeps that bit if it is not smaller. 16-bit keys are compared in
// pairs, two in a register, and neither half borrows from the other. Bit k of a word is for the k-th key, except that
// for 16-bit keys the even ones come first.
template <typename Key>
struct Answers {
  static constexpr bool kPaired = sizeof(Key) == 2;
  using Operand = std::conditional_t<sizeof(Key) == 8, uint64_t, uint32_t>;

  static constexpr int kEights = sizeof(Key) == 8 ? 1 : 8 / sizeof(Key);  // four loads of 16 bytes, at most
  static constexpr int kKeys = kEights * kEach;
  static constexpr int kOperands = kPaired ? kKeys / 2 : kKeys;
  static constexpr Operand kSigns = kPaired ? 0x80008000u : Operand{1} << (sizeof(Operand) * 8 - 1);

  static __device__ __forceinline__ Operand all(Operand key) { return kPaired ? key << 16 | key : key; }
  static __device__ __forceinline__ Operand guarded(Operand raw) { return raw | kSigns; }

  // Shifts the sign bit into the word. Written out, shifts like these keep nvcc busy for ever.
  static __device__ __forceinline__ void push(unsigned& answers, Operand signs) {
    const auto high = static_cast<unsigned>(signs >> (sizeof(Operand) * 8 - 32));
#if defined(__CUDACC__)
    answers = __funnelshift_l(high, answers, 1);
#else
    answers = answers << 1 | high >> 31;
#endif
  }

  // Asks is_so(operand), which answers by sign bits, for every operand.
  template <typename IsSo>
  static __device__ __forceinline__ unsigned ask(const Operand (&operands)[kOperands], IsSo is_so) {
    unsigned answers = 0;
#pragma unroll
    for (int step = 0; step < kOperands; ++step) {
      if (kPaired) {
        answers = answers >> 1 | static_cast<unsigned>(is_so(operands[step]) & kSigns);
      } else {
        push(answers, is_so(operands[kOperands - 1 - step]));
      }
    }
    return answers;
  }

  static __device__ __forceinline__ int key_of(int bit) { return kPaired ? bit % 16 * 2 + bit / 16 : bit; }

  // Puts bits, one per key in the order of the keys, into the order of the answers.
  static __device__ __forceinline__ unsigned arranged(unsigned bits) {
    if (!kPaired) return bits;
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
  static __device__ __forceinline__ unsigned of_eight(unsigned answers, int e) {
    return kPaired ? answers >> e * 4 & 0x000f000fu : answers >> e * kEach & 0xffu;
  }
};

}  // namespace gmp::cuda
