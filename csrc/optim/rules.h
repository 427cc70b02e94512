// The optimizers' rules for everybody: what follows from the rows of update_rule.h.
#pragma once

#include <cstdint>

#include "update_rule.h"

// Always inlined: the linker would merge functions that several instruction sets' translation units define, and the
// copy that stays could be one that this CPU cannot run.
#if defined(__CUDACC__)
#define GMP_INLINE __device__ __forceinline__
#else
#define GMP_INLINE inline __attribute__((always_inline))
#endif

namespace gmp {

enum class Rule : int {
#define GMP_RULE(name, fewest, most) name,
  GMP_RULES(GMP_RULE)
#undef GMP_RULE
};

// Arrays of state per weight that each rule keeps: the fewest, and the most.
inline constexpr int kNumStates[][2] = {
#define GMP_RULE(name, fewest, most) {fewest, most},
    GMP_RULES(GMP_RULE)
#undef GMP_RULE
};
inline constexpr int kNumRules = sizeof(kNumStates) / sizeof(*kNumStates);
inline constexpr int kMaxStates = 3;  // of any rule

template <Rule kRule>
inline constexpr int kFewestStates = kNumStates[static_cast<int>(kRule)][0];
template <Rule kRule>
inline constexpr int kMostStates = kNumStates[static_cast<int>(kRule)][1];

enum class Part : int {
#define GMP_PART(name, is_used) name,
  GMP_PARTS(GMP_PART)
#undef GMP_PART
};

// Constants of one tensor at one step, in the type the arithmetic runs in.
template <typename T>
struct UpdateConstants {
#define GMP_CONSTANT(name, absent) T name;
  GMP_CONSTANTS(GMP_CONSTANT)
#undef GMP_CONSTANT

  template <typename U>
  GMP_INLINE UpdateConstants<U> as() const {
#define GMP_CONSTANT(name, absent) static_cast<U>(name),
    return {GMP_CONSTANTS(GMP_CONSTANT)};
#undef GMP_CONSTANT
  }

  GMP_INLINE bool uses(Part part) const {
    const UpdateConstants& c = *this;
#define GMP_PART(name, is_used) \
  if (part == Part::name) return is_used;
    GMP_PARTS(GMP_PART)
#undef GMP_PART
    return false;
  }
};

// Rounds the bits of a float, or of each in a vector, to bfloat16: up or down at random, so that the result is right on
// average. Rounded to nearest, an average that moves by less than half a unit per step would stay where it is, as
// Adam's of the squares does when gradients get smaller. The random number is a hash of the bits: their product with an
// odd factor that each step draws anew. So every processor, layout and number of ranks rounds alike. NaN becomes the
// quiet NaN that torch writes. Source of the hash: M. Dietzfelbinger et al., A reliable randomized algorithm for the
// closest-pair problem (1997).
template <typename Bits, typename Flags>
GMP_INLINE Bits rounded_at_random(Bits bits, Flags is_nan, uint32_t factor) {
  const Bits rounded = (bits + (bits * factor >> 16)) >> 16, nan = Bits{} + 0x7fc0u;
  return is_nan ? nan : rounded;
}

// The factor of a step. Source of the mixing: C. Wellons, hash-prospector (lowbias32).
template <typename C>
GMP_INLINE uint32_t rounding_factor(const C& c) {
  uint32_t hash = (static_cast<uint32_t>(c.rounding_seed) + 1) * 0x9e3779b9u;
  hash = (hash ^ hash >> 16) * 0x7feb352du;
  hash = (hash ^ hash >> 15) * 0x846ca68bu;
  return (hash ^ hash >> 16) | 1;
}

// Constants that use none of the parts but `kUsed`, which the compiler knows, so that no loop has to ask.
template <typename T, Part... kUsed>
struct Specialized : UpdateConstants<T> {
  static constexpr GMP_INLINE bool uses(Part part) { return ((part == kUsed) || ...); }
  GMP_INLINE explicit Specialized(const UpdateConstants<T>& c) : UpdateConstants<T>(c) {}
};

}  // namespace gmp
