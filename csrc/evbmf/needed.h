// The eigenvalues of a Gram matrix on which the minimum of the free energy can depend, from counts of them.
// A value lambda = M c adds at least min(c s, 1 + alpha) to s dOmega/ds, s = 1 / sigma^2, so where the sum of
// these exceeds L, Omega increases for good. With N(t) values above t, the sum of min(lambda, t) is the
// integral of N from 0 to t; counts on a grid of shifts bound it from below.
#pragma once

#include "free_energy.h"

namespace rmsgd {

struct NeededValues {
  int count;
  double lower;    // the needed values lie above this, and all others at or below
  double s_limit;  // no minimum has 1 / sigma^2 above this
};

RMSGD_FN NeededValues all_values(int L) { return {L, 0.0, INFINITY}; }

// Finds them for an L x L Gram matrix, L <= M, of this trace.
struct BoundGrid {
  static constexpr int SIZE = 96;
  static constexpr double RATIO = 1.06;  // the ratio of a shift to the one before
  double L, M, trace;

  // The last shift is the average that min(lambda, t) of all values would have to reach.
  RMSGD_FN double first_shift() const {
    constexpr double SPAN = 253.5;  // RATIO^(SIZE - 1)
    return (1.0 + L / M) * trace / L / SPAN;
  }

  // The 1 / sigma^2 above which there is no minimum, from the numbers of values above each shift; infinity if
  // it is not known.
  RMSGD_FN double s_limit(const int* counts) const {
    double limit = INFINITY, integral = 0.0, left = 0.0, shift = first_shift();
    for (int i = 0; i < SIZE; ++i, shift *= RATIO) {
      integral += (shift - left) * counts[i];
      left = shift;
      if (integral * (1.0 + L / M) > L * 1.001 * shift) limit = 1.05 * M * (1.0 + L / M) / shift;
    }
    return limit;
  }

  // No minimum up to a finite `limit` keeps a value at or below this.
  RMSGD_FN double lower(double limit) const { return M * Threshold(L, M).x / limit; }
};

}  // namespace rmsgd
