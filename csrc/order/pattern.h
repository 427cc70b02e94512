// What of a layer is ranked, and what of it is protected: kept whatever its rank. gmp_kernels/patterns.py says more; a
// new pattern gets a kind here.
#pragma once

#include <cstdint>

namespace gmp {

enum class PatternKind : int {
  kNone,    // every weight is ranked, and none protected
  kGroups,  // of each group of weights, the `keep` last in the order are protected
  kBlocks,  // blocks of weights are ranked by the sum of their magnitudes
};

// In memory the weights of a group lie `stride` apart. As many groups as that lie between each other, and fill
// of * stride weights in a row. The blocks of a matrix of `width` columns lie in bands of `rows` rows.
struct Pattern {
  PatternKind kind = PatternKind::kNone;
  int64_t a = 0, b = 0, c = 0;

  constexpr int64_t keep() const { return a; }
  constexpr int64_t of() const { return b; }
  constexpr int64_t stride() const { return c; }

  constexpr int64_t rows() const { return a; }
  constexpr int64_t cols() const { return b; }
  constexpr int64_t width() const { return c; }
  constexpr int64_t across() const { return c / b; }  // blocks of a band
};

}  // namespace gmp
