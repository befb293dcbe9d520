// From a tridiagonal matrix to a row of the metrics table, by teams: the eigenvalues that EVBMF may
// need, in parts, its minimum, and whether they were accurate enough to decide it.
#pragma once

#include "../evbmf/metrics.h"
#include "../evbmf/needed.h"
#include "../evbmf/numerical_zero.h"
#include "stage.h"
#include "sturm.h"
#include "tridiagonal.h"

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

// Which eigenvalues are wanted.
struct SpectrumBounds {
  NeededValues needed;
  double upper;  // none is above this
  int nonzero;   // values other than zero, -1 where that is open, see nonzero_values
};

// The bounds of a Gram matrix that was scaled to the trace `trace` (about 1) and reduced. nonzero_rows: see
// largest_zero_row. rounding: see rounding_of. counts: BoundGrid::SIZE ints of scratch, shared.
template <class T, class Team>
RMSGD_FN SpectrumBounds spectrum_bounds(Team& team, const Tridiagonal<T>& tridiagonal, int L, double M,
                                        double trace, int nonzero_rows, double rounding, int* counts) {
  T upper = 0;  // Gershgorin
  for (int i = team.rank(); i < L; i += team.size()) {
    const T left = i > 0 ? T(fabs(tridiagonal.off_diagonal[i - 1])) : T(0),
            right = i + 1 < L ? T(fabs(tridiagonal.off_diagonal[i])) : T(0);
    const T bound = tridiagonal.diagonal[i] + left + right;
    if (bound > upper) upper = bound;
  }
  upper = team.max(upper) * T(1.000001);
  const auto above = [&](double shift) {
    return eigenvalues_above(tridiagonal.diagonal, tridiagonal.squares, L, T(shift));
  };
  const int nonzero = nonzero_values(above, rounding_energy(trace, L, M, rounding),
                                     gram_error(stage_of<T>(), double(upper)), nonzero_rows, L, M);
  if (nonzero < 0) return {{0, 0.0, INFINITY}, double(upper), nonzero};
  if (nonzero < L) return {all_values(nonzero), double(upper), nonzero};
  return {needed_values(team, tridiagonal.diagonal, tridiagonal.squares, L, M, trace, double(upper), counts),
          double(upper), nonzero};
}

// The wanted values are found in parts of so many, each by a team of its own.
constexpr int STURM_PART = 32;

// Elements of T of scratch and ints of counts for one part.
constexpr int STURM_SCRATCH = 2 * STURM_PART;
RMSGD_FN int sturm_part_counts(int members) {
  return sturm_counts(BoundGrid::SIZE > STURM_PART ? BoundGrid::SIZE : STURM_PART, members);
}

// Part number `part`. scratch and counts: shared by the team; values: of all parts.
template <class T, class Team>
RMSGD_FN void find_part(Team& team, const Tridiagonal<T>& tridiagonal, int L, const SpectrumBounds& bounds,
                        int part, T* scratch, int* counts, T* values) {
  const int first = part * STURM_PART;
  const int rest = bounds.needed.count - first, count = rest < STURM_PART ? rest : STURM_PART;
  if (count <= 0) return;
  largest_eigenvalues(team, tridiagonal.diagonal, tridiagonal.squares, L, first, count,
                      T(bounds.needed.lower), T(bounds.upper), scratch, scratch + STURM_PART, counts,
                      values + first);
}

// Bytes of scratch of known_spectrum for matrices of L rows and `members` members.
template <class T>
RMSGD_FN int spectrum_scratch(int L, int members) {
  return 2 * (L + 2) * int(sizeof(double)) + 2 * (L + 2) * int(sizeof(T)) +
         (sturm_counts(L, members) + 2) * int(sizeof(int));
}

struct TridiagonalSpectrum {
  int nonzero;     // see SpectrumBounds; where that is open, nothing else is known
  int count;       // values known: the largest ones, over M, in `c`, descending
  double rest;     // the sum of the others, over M
  double s_limit;  // see minimise_free_energy
  double next;     // no value beyond the known ones is above this
  double largest;  // lambda_1
  const double* c;
  double* tails;  // count + 1 doubles of scratch
};

// The spectrum from the values of all parts. Where these leave too little of the trace for the sum of the
// others to have digits enough, all values are found here. scratch: 16-byte aligned, shared.
template <class T, class Team>
RMSGD_FN TridiagonalSpectrum known_spectrum(Team& team, const Tridiagonal<T>& tridiagonal, int L, double M,
                                            double trace, const SpectrumBounds& bounds, T* values,
                                            unsigned char* scratch) {
  double* const c = reinterpret_cast<double*>(scratch);
  double* const tails = c + L + 2;
  T* const low = reinterpret_cast<T*>(tails + L + 2);
  T* const high = low + L + 2;
  int* const counts = reinterpret_cast<int*>(high + L + 2);

  if (bounds.nonzero < 0) return {bounds.nonzero, 0, 0.0, INFINITY, 0.0, 0.0, c, tails};
  NeededValues needed = bounds.needed;
  double sum = 0.0;
  for (int h = team.rank(); h < needed.count; h += team.size()) sum += double(values[h]);
  double rest = trace - team.sum(sum);
  if (needed.count < bounds.nonzero && !(rest > 1e-4 * trace)) {
    needed = all_values(bounds.nonzero);
    largest_eigenvalues(team, tridiagonal.diagonal, tridiagonal.squares, L, 0, needed.count, T(0),
                        T(bounds.upper), low, high, counts, values);
  }
  if (needed.count == bounds.nonzero) rest = 0.0;
  const double largest = needed.count > 0 ? double(values[0]) : bounds.upper;
  // Values of an fp32 Gram matrix that are lost in rounding fail the guard; those of an fp64 one are
  // zero where double could not tell them from it.
  const double zero = sizeof(T) == 8 ? 64.0 * L * roundoff(STAGE_FP64) * largest : 0.0;
  for (int h = team.rank(); h < needed.count; h += team.size()) {
    c[h] = double(values[h]) > zero ? double(values[h]) / M : 0.0;
  }
  team.barrier();
  return {bounds.nonzero, needed.count, rest / M, needed.s_limit, needed.lower / M, largest, c, tails};
}

// EVBMF of that spectrum: writes the row if the values decide it, else returns false. The Gram matrix was
// scaled by 2^exponent before its values were taken.
template <class T, class Team>
RMSGD_FN bool measure_spectrum(Team& team, const TridiagonalSpectrum& spectrum, int L, double M, int exponent,
                               double* row) {
  if (spectrum.nonzero < 0) return false;
  const FreeEnergyMinimum minimum = minimise_free_energy(team, spectrum.c, spectrum.count, spectrum.rest, L,
                                                         M, spectrum.s_limit, spectrum.tails);
  ModeMetrics metrics = mode_metrics(team, spectrum.c, minimum, double(L), M);
  const double next = minimum.rank < spectrum.count ? spectrum.c[minimum.rank] : spectrum.next;
  const double error = gram_error(stage_of<T>(), spectrum.largest);
  if (!trustworthy(minimum, metrics, spectrum.c, next, spectrum.nonzero, L, M, error)) return false;
  metrics.noise_variance = ldexp(metrics.noise_variance, -exponent);
  if (team.rank() == 0) write_metrics(row, metrics, MEASURED, stage_of<T>());
  return true;
}

// The same from all L eigenvalues of an fp64 Gram matrix, descending, scaled to a largest near 1. Where they
// do not decide, the row's status is NEEDS_SVD. rounding: see rounding_of. scratch: 2 L + 2 doubles.
template <class Team>
RMSGD_FN void measure_eigenvalues(Team& team, const double* values, int L, double M, double rounding,
                                  double* scratch, double* row) {
  double trace = 0.0;
  for (int h = team.rank(); h < L; h += team.size()) trace += values[h];
  trace = team.sum(trace);
  const auto above = [&](double shift) {
    int count = 0;
    while (count < L && values[count] > shift) ++count;
    return count;
  };
  const int nonzero = nonzero_values(above, rounding_energy(trace, L, M, rounding),
                                     gram_error(STAGE_FP64, values[0]), L, L, M);
  const int count = nonzero < 0 ? L : nonzero;
  const double zero = 64.0 * L * roundoff(STAGE_FP64) * values[0];
  for (int h = team.rank(); h < count; h += team.size()) scratch[h] = values[h] > zero ? values[h] / M : 0.0;
  team.barrier();
  const TridiagonalSpectrum spectrum = {nonzero, count,     0.0,     INFINITY,
                                        0.0,     values[0], scratch, scratch + L + 1};
  if (!measure_spectrum<double>(team, spectrum, L, M, 0, row) && team.rank() == 0) {
    write_metrics(row, {0, 0.0, 0.0, 1.0, 0.0}, NEEDS_SVD, STAGE_FP64);
  }
}

}  // namespace rmsgd
