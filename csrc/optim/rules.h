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

// Constants that use none of the parts but `kUsed`, which the compiler knows, so that no loop has to ask.
template <typename T, Part... kUsed>
struct Specialized : UpdateConstants<T> {
  static constexpr GMP_INLINE bool uses(Part part) { return ((part == kUsed) || ...); }
  GMP_INLINE explicit Specialized(const UpdateConstants<T>& c) : UpdateConstants<T>(c) {}
};

}  // namespace gmp
