// The arithmetic of a bracket from a sample, for the host and for a GPU. Nothing is ever concluded from it without a
// count.
#pragma once

#include <cmath>

#include "bracket.h"

namespace gmp {

// How many ranks the wanted key may lie from `rank` in a sample, to either side: so many standard deviations of the
// number of sampled keys before it, and two for rounding. `share` is the fraction of all keys that come before it.
template <typename Real>
GMP_HOST_DEVICE Real rank_margin(Real rank, Real share, Real deviations) {
  return Real(2) + deviations * std::sqrt(rank * (Real(1) - share));
}

// A bound that a count with mean `expected` hardly ever exceeds; its standard deviation is the root of its mean.
template <typename Real>
GMP_HOST_DEVICE Real highest_count(Real expected, Real deviations) {
  return expected + deviations * std::sqrt(expected);
}

}  // namespace gmp
