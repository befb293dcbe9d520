// The largest eigenvalues of a symmetric tridiagonal matrix, by a team: bisection on Sturm counts.
//
// QL and QR iterations are one serial chain; counts for different shifts are independent, and only the
// eigenvalues that EVBMF can keep are looked for. Members that outnumber the eigenvalues cut brackets
// into more than two parts: with k members for each, a round wins log2(k + 1) bits.
#pragma once

#include "../team.h"

namespace rmsgd {

// a / b, on a GPU within 2 units in the last place in fp32. A count that divides so is that of a matrix whose
// off-diagonal elements differ by as much, and its eigenvalues by no more than 2 u lambda_1 of the 8 that
// the accuracy guard allows for.
template <class T>
RMSGD_FN T quotient(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 4) return __fdividef(a, b);
#endif
  return a / b;
}

// How many eigenvalues are above `shift`: positive pivots of T - shift = L D L^T.
// diagonal (n); squares (n - 1) of the off-diagonal.
template <class T>
RMSGD_FN int eigenvalues_above(const T* diagonal, const T* squares, int n, T shift) {
  const T tiny = sizeof(T) == 4 ? T(0x1p-100) : T(0x1p-900);
  T pivot = diagonal[0] - shift;
  int above = pivot > T(0);
  for (int i = 1; i < n; ++i) {
    if (pivot < tiny && pivot > -tiny) pivot = -tiny;
    pivot = diagonal[i] - shift - quotient(squares[i - 1], pivot);
    above += pivot > T(0);
  }
  return above;
}

// Most parts less one that a bracket is cut into: whoever looks through the counts does so one by one.
constexpr int STURM_CUTS = 255;

// Elements of `counts` below.
RMSGD_FN int sturm_counts(int count, int members) { return count > members ? count : members; }

// values[h] = the eigenvalue number first + h of those in descending order, h < count, known to lie in
// (lower, upper]; each within (upper - lower) 2^-26 (float) or 2^-54 (double) and rounding.
// low, high (count) and counts (sturm_counts(count, team size)): scratch. All shared by the team; values
// may be `low`.
template <class T, class Team>
RMSGD_FN void largest_eigenvalues(Team& team, const T* diagonal, const T* squares, int n, int first,
                                  int count, T lower, T upper, T* low, T* high, int* counts, T* values) {
  int cuts = count > 0 ? team.size() / count : 1;
  if (cuts < 1) cuts = 1;
  if (cuts > STURM_CUTS) cuts = STURM_CUTS;
  for (int h = team.rank(); h < count; h += team.size()) {
    low[h] = lower;
    high[h] = upper;
  }
  team.barrier();
  const double needed = sizeof(T) == 4 ? 0x1p26 : 0x1p54;
  for (double cut = 1.0; cut < needed; cut *= cuts + 1) {
    for (int i = team.rank(); i < count * cuts; i += team.size()) {
      const int h = i / cuts;
      const T shift = low[h] + (high[h] - low[h]) * T(i % cuts + 1) / T(cuts + 1);
      counts[i] = eigenvalues_above(diagonal, squares, n, shift);
    }
    team.barrier();
    for (int h = team.rank(); h < count; h += team.size()) {
      // The value is above the last shift that has more than first + h eigenvalues above it.
      int below = 0;
      while (below < cuts && counts[h * cuts + below] > first + h) ++below;
      const T from = low[h], width = high[h] - low[h];
      low[h] = below > 0 ? from + width * T(below) / T(cuts + 1) : from;
      high[h] = below < cuts ? from + width * T(below + 1) / T(cuts + 1) : high[h];
    }
    team.barrier();
  }
  for (int h = team.rank(); h < count; h += team.size()) values[h] = T(0.5) * (low[h] + high[h]);
  team.barrier();
}

}  // namespace rmsgd
