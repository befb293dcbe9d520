// From a tridiagonal matrix to a row of the metrics table, by a team: the eigenvalues that EVBMF may
// need, its minimum, and whether they were accurate enough to decide it.
#pragma once

#include "../evbmf/metrics.h"
#include "../evbmf/needed.h"
#include "stage.h"
#include "sturm.h"

namespace rmsgd {

// counts: BoundGrid::SIZE ints of scratch, shared.
template <class T, class Team>
RMSGD_FN NeededValues needed_values(Team& team, const T* diagonal, const T* squares, int L, double M,
                                    double trace, double upper, int* counts) {
  const BoundGrid grid = {double(L), M, trace};
  for (int i = team.rank(); i < BoundGrid::SIZE; i += team.size()) {
    double shift = grid.first_shift();
    for (int k = 0; k < i; ++k) shift *= BoundGrid::RATIO;
    counts[i] = eigenvalues_above(diagonal, squares, L, T(shift));
  }
  team.barrier();
  const double limit = team.sum(team.rank() == 0 ? grid.s_limit(counts) : 0.0);
  if (limit == INFINITY) return all_values(L);
  const double lower = grid.lower(limit);
  if (lower >= upper) return {0, lower, limit};
  return {eigenvalues_above(diagonal, squares, L, T(lower)), lower, limit};
}

// Scratch of measure_tridiagonal for matrices of up to L rows and `members` members, in bytes.
template <class T>
RMSGD_FN int measure_scratch(int L, int members) {
  const int counts = sturm_counts(L > BoundGrid::SIZE ? L : BoundGrid::SIZE, members);
  return (2 * L + 2) * int(sizeof(T)) + (2 * L + 2) * int(sizeof(T)) + (L + 2) * int(sizeof(double)) +
         (counts + 2) * int(sizeof(int));
}

struct TridiagonalSpectrum {
  int nonzero;     // values that can be other than zero, see nonzero_values
  int count;       // values known: the largest ones, over M, in `c`, descending
  double rest;     // the sum of the others, over M
  double s_limit;  // see minimise_free_energy
  double next;     // no value beyond the known ones is above this
  double largest;  // lambda_1
  const double* c;
  double* tails;  // count + 1 doubles of scratch
};

// The values of a Gram matrix that was scaled to the trace `trace` (about 1) and reduced. nonzero_rows: of
// the weight.
template <class T, class Team>
RMSGD_FN TridiagonalSpectrum tridiagonal_spectrum(Team& team, const T* diagonal_in, const T* off_diagonal,
                                                  int L, double M, double trace, int nonzero_rows,
                                                  unsigned char* scratch) {
  double* const c = reinterpret_cast<double*>(scratch);
  T* const diagonal = reinterpret_cast<T*>(c + L + 2);
  T* const squares = diagonal + L + 1;
  T* const low = squares + L + 1;
  T* const high = low + L + 1;
  int* const counts = reinterpret_cast<int*>(high + L + 1);

  T upper = 0;  // Gershgorin
  for (int i = team.rank(); i < L; i += team.size()) {
    const T left = i > 0 ? T(fabs(off_diagonal[i - 1])) : T(0),
            right = i + 1 < L ? T(fabs(off_diagonal[i])) : T(0);
    diagonal[i] = diagonal_in[i];
    squares[i] = right * right;
    const T bound = diagonal_in[i] + left + right;
    if (bound > upper) upper = bound;
  }
  upper = team.max(upper) * T(1.000001);

  const int nonzero = nonzero_values(nonzero_rows, L, M);
  NeededValues needed = nonzero < L
                            ? all_values(nonzero)
                            : needed_values(team, diagonal, squares, L, M, trace, double(upper), counts);
  double rest = 0.0;
  for (;;) {
    team.barrier();  // counts are free again
    largest_eigenvalues(team, diagonal, squares, L, needed.count, T(needed.lower), upper, low, high, counts,
                        low);
    double sum = 0.0;
    for (int h = team.rank(); h < needed.count; h += team.size()) sum += double(low[h]);
    rest = trace - team.sum(sum);
    if (needed.count == nonzero) {
      rest = 0.0;
      break;
    }
    // The rest of the trace has digits enough only while it is no small difference.
    if (rest > 1e-4 * trace) break;
    needed = all_values(L);
  }
  const double largest = needed.count > 0 ? double(low[0]) : double(upper);
  // Values of an fp32 Gram matrix that are lost in rounding fail the guard; those of an fp64 one are
  // zero where double could not tell them from it.
  const double zero = sizeof(T) == 8 ? 64.0 * L * roundoff(STAGE_FP64) * largest : 0.0;
  for (int h = team.rank(); h < needed.count; h += team.size()) {
    c[h] = double(low[h]) > zero ? double(low[h]) / M : 0.0;
  }
  team.barrier();
  return {nonzero,          needed.count, rest / M, needed.s_limit,
          needed.lower / M, largest,      c,        reinterpret_cast<double*>(diagonal)};
}

// EVBMF of that spectrum: writes the row if the values decide it, else returns false. The Gram matrix was
// scaled by 2^exponent before its values were taken.
template <class T, class Team>
RMSGD_FN bool measure_spectrum(Team& team, const TridiagonalSpectrum& spectrum, int L, double M, int exponent,
                               double* row) {
  const FreeEnergyMinimum minimum = minimise_free_energy(team, spectrum.c, spectrum.count, spectrum.rest, L,
                                                         M, spectrum.s_limit, spectrum.tails);
  ModeMetrics metrics = mode_metrics(team, spectrum.c, minimum, double(L), M);
  const double next = minimum.rank < spectrum.count ? spectrum.c[minimum.rank] : spectrum.next;
  const double error = 8.0 * roundoff(stage_of<T>()) * spectrum.largest;
  if (!trustworthy(minimum, metrics, spectrum.c, next, spectrum.nonzero, L, M, error)) return false;
  metrics.noise_variance = ldexp(metrics.noise_variance, -exponent);
  if (team.rank() == 0) write_metrics(row, metrics, MEASURED, stage_of<T>());
  return true;
}

// The same from all L eigenvalues of an fp64 Gram matrix, descending, scaled to a largest near 1. Where they
// do not decide, the row's status is NEEDS_SVD. scratch: 2 L + 2 doubles.
template <class Team>
RMSGD_FN void measure_eigenvalues(Team& team, const double* values, int L, double M, double* scratch,
                                  double* row) {
  const double zero = 64.0 * L * roundoff(STAGE_FP64) * values[0];
  for (int h = team.rank(); h < L; h += team.size()) scratch[h] = values[h] > zero ? values[h] / M : 0.0;
  team.barrier();
  const TridiagonalSpectrum spectrum = {L, L, 0.0, INFINITY, 0.0, values[0], scratch, scratch + L + 1};
  if (!measure_spectrum<double>(team, spectrum, L, M, 0, row) && team.rank() == 0) {
    write_metrics(row, {0, 0.0, 0.0, 1.0, 0.0}, NEEDS_SVD, STAGE_FP64);
  }
}

}  // namespace rmsgd
