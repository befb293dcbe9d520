// From the minimum of the free energy to the report: shrinkage, the metrics of the low-rank part, and
// whether the singular values were accurate enough for both.
#pragma once

#include "free_energy.h"

namespace rmsgd {

// One row of the metrics table: the results for one matrix, all of them doubles.
enum MetricsField : int {
  RANK,
  NOISE_VARIANCE,
  STABLE_RANK,
  CONDITION_NUMBER,
  NUCLEAR,
  STATUS,  // MetricsStatus
  STAGE,   // Stage
  METRICS_FIELDS
};

enum MetricsStatus : int { MEASURED, NOT_FINITE, NEEDS_SVD, CHANGED };

// The source of the singular values: a Gram matrix in fp32, a Gram matrix in fp64, or an SVD. On a GPU it
// also says which of them a matrix waits for, and STAGE_DONE that it waits for none.
enum Stage : int { STAGE_FP32, STAGE_FP64, STAGE_SVD, STAGE_DONE };

struct ModeMetrics {
  int rank;
  double noise_variance;
  double stable_rank;        // sum d_i^2 / (L d_1^2), Eq. 2; 0 when the rank is 0
  double condition_number;   // 1 - d_r / d_1, Eq. 3; 1 when the rank is 0
  double nuclear;            // sum d_i / d_1, which the released code divides by a channel count
  double noise_slope = 0.0;  // -d ln(stable_rank) / d ln(sigma^2), with only the d_i moving
};

// The EVBMF shrinkage of one kept singular value, as the factor d / gamma:
// (1 - (L+M) sigma^2/gamma^2 + sqrt((1 - (L+M) sigma^2/gamma^2)^2 - 4 L M sigma^4/gamma^4)) / 2,
// written in x = gamma^2 / (M sigma^2).
RMSGD_FN double shrinkage(double c, double noise_variance, double alpha) {
  if (noise_variance <= 0.0) return 1.0;
  const double y = noise_variance / c;
  const double b = 1.0 - (1.0 + alpha) * y;
  return 0.5 * (b + sqrt(b * b - 4.0 * alpha * y * y));
}

// d ln d / d ln lambda of a shrunk value, and one half more than -d ln d / d ln sigma^2.
RMSGD_FN double shrinkage_slope(double c, double noise_variance, double alpha) {
  const double tau = tau_of(c / noise_variance, alpha);
  return (1.0 + tau) * (tau + alpha) / (tau * tau - alpha) - 0.5;
}

// Metrics of the low-rank part. c: the squared singular values over M, descending, at least
// minimum.rank of them.
template <class Team>
RMSGD_FN ModeMetrics mode_metrics(Team& team, const double* c, const FreeEnergyMinimum& minimum, double L,
                                  double M) {
  const int rank = minimum.rank;
  const double variance = minimum.noise_variance;
  if (rank == 0) return {0, variance, 0.0, 1.0, 0.0};
  const double alpha = L / M;
  const double first = sqrt(c[0]) * shrinkage(c[0], variance, alpha);
  const double last = sqrt(c[rank - 1]) * shrinkage(c[rank - 1], variance, alpha);
  const bool exact = !(variance > 0.0);
  const double first_slope = exact ? 0.0 : shrinkage_slope(c[0], variance, alpha);
  double energy = 0.0, nuclear = 0.0, slope = 0.0;
  for (int h = team.rank(); h < rank; h += team.size()) {
    const double ratio = sqrt(c[h]) * shrinkage(c[h], variance, alpha) / first;
    energy += ratio * ratio;
    nuclear += ratio;
    if (!exact) slope += ratio * ratio * (shrinkage_slope(c[h], variance, alpha) - first_slope);
  }
  energy = team.sum(energy);
  return {rank, variance, energy / L, 1.0 - last / first, team.sum(nuclear), 2.0 * team.sum(slope) / energy};
}

// How far values lambda = M c may be off (absolute): `count` of them, the largest ones and far above the
// others, by `largest`, and the others by `others`. The error of the former is in the sum of all as well.
struct ValueErrors {
  double others, largest;
  int count;

  RMSGD_FN ValueErrors(double all) : others(all), largest(all), count(0) {}
  RMSGD_FN ValueErrors(double others, double largest, int count)
      : others(others), largest(largest), count(count) {}

  RMSGD_FN double of(int h) const { return h < count ? largest : others; }

  // What all values and an exact sum could be off by to move Omega as much at one minimum against another. At
  // each, an error of a value far above the threshold, x sigma^2, moves it by nearly the same: they differ by
  // 1 / x^2 of what one at the threshold would do.
  RMSGD_FN double at_threshold(const double* c, const FreeEnergyMinimum& minimum) const {
    if (count == 0) return others;
    if (minimum.rank < count) return others + largest;
    const double x = c[count - 1] / minimum.noise_variance;
    return others + largest / (x * x);
  }
};

// Whether values lambda = M c, each known to within its error and their sum much better, are good
// enough: no other rank can win, sigma^2 is within 1e-4 of itself, the condition within 1e-5 and the stable
// rank within 1e-6 (a sum of k errors counts as sqrt(k) of them, since rounding has no preferred sign). This
// holds to first order. The metrics are ratios, so an error of sigma^2 reaches them only by the difference
// between the slopes of the values that they compare.
// next: the largest value below the threshold, c[rank]. nonzero: how many values are other than zero, see
// numerical_zero.h.
RMSGD_FN bool trustworthy(const FreeEnergyMinimum& minimum, const ModeMetrics& metrics, const double* c,
                          double next, int nonzero, double L, double M, const ValueErrors& errors) {
  if (!(minimum.noise_variance > 0.0)) {
    // For a weight of low rank the number of zeros is known; in other weights rounding may have removed a
    // value. The error of the stable rank is within 2 error / lambda_1, or 1e-6.
    if (minimum.rank < nonzero) return false;
    const double first = M * c[0], last = M * c[minimum.rank - 1];
    const double last_error = errors.of(minimum.rank - 1);
    return last > 4.0 * last_error &&
           0.5 * (1.0 - metrics.condition_number) * (errors.of(0) / first + last_error / last) < 1e-5;
  }
  const Threshold threshold(L, M);
  const double error = errors.at_threshold(c, minimum);
  const double relative = error / (M * minimum.noise_variance);
  if (!(relative < LARGEST_ERROR * threshold.x && error < M * minimum.tolerance)) return false;

  const int rank = minimum.rank;
  if (rank == 0) return true;
  // At a right end sigma^2 is c_{k+1} / x_; at a root of G the errors of the kept values move it.
  const bool right_end = next >= (1.0 - 1e-9) * threshold.x * minimum.noise_variance;
  const double noise_error = right_end
                                 ? relative / threshold.x
                                 : 1.2 * sqrt(rank + 1.0) * relative / (L - rank * (1.0 + threshold.alpha));
  if (!(noise_error < 1e-4)) return false;
  if (rank == 1) return true;
  const double first_slope = shrinkage_slope(c[0], minimum.noise_variance, threshold.alpha);
  const double last_slope = shrinkage_slope(c[rank - 1], minimum.noise_variance, threshold.alpha);
  const double first_error = first_slope * errors.of(0) / (M * c[0]);
  const double last_error = last_slope * errors.of(rank - 1) / (M * c[rank - 1]);
  const double condition_error = (1.0 - metrics.condition_number) *
                                 (first_error + last_error + (last_slope - first_slope) * noise_error);
  const double sum = sqrt(double(rank)) * errors.others + sqrt(double(errors.count)) * errors.largest;
  const double sum_error = last_slope / L * sum / (M * c[0]);
  const double stable_rank_error =
      2.0 * sum_error + metrics.stable_rank * (2.0 * first_error + metrics.noise_slope * noise_error);
  return condition_error < 1e-5 && stable_rank_error < 1e-6;
}

RMSGD_FN void write_metrics(double* row, const ModeMetrics& metrics, MetricsStatus status, Stage stage) {
  row[RANK] = metrics.rank;
  row[NOISE_VARIANCE] = metrics.noise_variance;
  row[STABLE_RANK] = metrics.stable_rank;
  row[CONDITION_NUMBER] = metrics.condition_number;
  row[NUCLEAR] = metrics.nuclear;
  row[STATUS] = status;
  row[STAGE] = stage;
}

// The row of the metrics table for singular values gamma (L), descending, with the numerically zero ones
// set to 0. A single row (L = 1) has no spectrum: its rank is 0 and sigma^2 = gamma^2 / M.
// scratch has 2 L + 1 doubles, which the team shares.
template <class Team>
RMSGD_FN void measure_singular_values(Team& team, const double* gamma, int L, double M, double* scratch,
                                      double* row) {
  ModeMetrics metrics = {0, gamma[0] * gamma[0] / M, 0.0, 1.0, 0.0};
  if (L > 1 && gamma[0] > 0.0) {
    int exponent = 0;  // a power of two, so that squares neither overflow nor vanish
    frexp(gamma[0], &exponent);
    double* c = scratch;
    for (int h = team.rank(); h < L; h += team.size()) {
      const double scaled = ldexp(gamma[h], -exponent);
      c[h] = scaled * scaled / M;
    }
    team.barrier();
    const FreeEnergyMinimum minimum = minimise_free_energy(team, c, L, 0.0, L, M, INFINITY, scratch + L);
    metrics = mode_metrics(team, c, minimum, L, M);
    metrics.noise_variance = ldexp(ldexp(minimum.noise_variance, exponent), exponent);
  }
  if (team.rank() == 0) write_metrics(row, metrics, MEASURED, STAGE_SVD);
}

}  // namespace rmsgd
