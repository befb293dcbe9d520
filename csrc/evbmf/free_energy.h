// The EVBMF noise variance: the global minimiser of the free energy, exactly.
// Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational
// Bayesian matrix factorization", JMLR 14 (2013). For an L x M matrix (L <= M) with singular values
// gamma_h, write c_h = gamma_h^2 / M, alpha = L / M, x_h = c_h / sigma^2, s = 1 / sigma^2 and
//   Omega(sigma^2) = sum_h x_h + L log sigma^2
//                    + sum over x_h > x_ of  log(tau + 1) + alpha log(tau / alpha + 1) - tau
//   tau(x) = (x - (1 + alpha) + sqrt((x - (1 + alpha))^2 - 4 alpha)) / 2
//   tau_ = 2.5129 sqrt(alpha),  x_ = (1 + tau_)(1 + alpha / tau_)
// Omega has many local minima. Between two neighbouring breakpoints (x_ / c_k, x_ / c_{k+1}] the
// set of values above the threshold is fixed (k of them), and
//   G_k(s) = s dOmega/ds = s T_k - (L - k) + alpha sum_{h<=k} (1 + 1 / tau(c_h s)),
//   T_k = sum_{h>k} c_h,
// is convex in s, so the only interior minimum is its larger root, which Newton's iteration from
// the right end reaches monotonically. The remaining candidates are right ends, because Omega
// steps up (by at most about .01: 2.5129 is a rounded constant) as s passes a breakpoint.
#pragma once

#include "../team.h"

namespace rmsgd {

struct Threshold {
  double alpha, tau, x;

  RMSGD_FN Threshold(double rows, double columns) {
    alpha = rows / columns;
    tau = 2.5129 * sqrt(alpha);
    x = (1.0 + tau) * (1.0 + alpha / tau);
  }
};

// tau(x) for x at or above the threshold, where the root is real; tau + alpha / tau = x - (1 + alpha).
RMSGD_FN double tau_of(double x, double alpha) {
  const double t = x - (1.0 + alpha);
  return 0.5 * (t + sqrt(t * t - 4.0 * alpha));
}

struct FreeEnergyMinimum {
  int rank;               // how many values are above the threshold, the winning k
  double noise_variance;  // sigma^2, in the units of c
  double free_energy;     // Omega there
  double tolerance;  // if every c_h is off by no more than this and their sum is exact, `rank` still wins
};

// The largest error of a value, in units of sigma^2 times the threshold x_, that `tolerance` can guarantee.
constexpr double LARGEST_ERROR = 1e-3;

// By how much Omega at one minimum (k values above the threshold, 1 / sigma^2 = s) can move against Omega at
// another, per unit of error in every c_h while their sum is kept. To first order a minimum moves by
// s (g(x_h) / x_h - 1) for each value above its threshold, g = 1 + alpha (1 + 1 / tau), and by nothing for
// the others: two minima share all but |k - k'| terms, and the shared ones differ by at most 1.2 |s - s'|
// each. One more term is for right ends, which move with c_{k+1}, and the factor 2 covers the second order.
RMSGD_FN double swing(int k, double s, int other_k, double other_s) {
  const int shared = k < other_k ? k : other_k;
  return 2.0 * ((shared + 1) * fabs(s - other_s) + (abs(k - other_k) + 1) * (s > other_s ? s : other_s));
}

// One interval between breakpoints: the k largest values are above the threshold.
template <class Team>
struct FreeEnergyPiece {
  Team& team;
  const double* c;
  const Threshold& threshold;
  int k;
  double tail;  // T_k
  double L;

  struct Slope {
    double value;       // G_k(s)
    double derivative;  // dG_k/ds, from dtau/ds = c tau / (tau - alpha / tau)
  };

  RMSGD_FN Slope slope(double s) const {
    const double alpha = threshold.alpha;
    double inverse = 0.0, curvature = 0.0;
    for (int h = team.rank(); h < k; h += team.size()) {
      const double tau = tau_of(c[h] * s, alpha);
      inverse += 1.0 / tau;
      curvature += c[h] / (tau * tau - alpha);
    }
    inverse = team.sum(inverse);
    curvature = team.sum(curvature);
    return {s * tail - (L - k) + alpha * (k + inverse), tail - alpha * curvature};
  }

  // Omega(1 / s), with x - tau = 1 + alpha + alpha / tau so that large values do not cancel.
  RMSGD_FN double free_energy(double s) const {
    const double alpha = threshold.alpha;
    double sum = 0.0;
    for (int h = team.rank(); h < k; h += team.size()) {
      const double tau = tau_of(c[h] * s, alpha);
      sum += 1.0 + alpha + alpha / tau + log1p(tau) + alpha * log1p(tau / alpha);
    }
    return s * tail - L * log(s) + team.sum(sum);
  }

  // The larger root of G_k in (left, s], given G_k(s) > 0; 0 where there is none.
  RMSGD_FN double root_left_of(double s, Slope at_s, double left) const {
    for (int iteration = 0; iteration < 100; ++iteration) {
      if (at_s.derivative <= 0.0) return 0.0;  // G_k is convex, and its minimum is passed above zero
      const double next = s - at_s.value / at_s.derivative;
      if (!(next > left)) return 0.0;
      if (!(s - next > 1e-15 * s)) return next;
      s = next;
      at_s = slope(s);
      if (at_s.value <= 0.0) return s;  // this is rounding: Newton from the right stays right of the root
    }
    return s;
  }
};

// The global minimum over sigma^2.
//   c, count   the `count` largest of the L values, descending; values that count as zero are 0
//   rest       the sum of the L - count values not given (0 when count == L)
//   s_limit    no minimum has 1 / sigma^2 above this; infinity when count == L. With count < L every
//              value not given must be at or below x_ / s_limit.
//   tails      count + 1 doubles of scratch, shared by the team
// Where fewer than L / (1 + alpha) values are above zero, Omega has no lower bound: sigma^2 = 0 and
// the rank is their number. Otherwise the rank returned is below L / (1 + alpha).
template <class Team>
RMSGD_FN FreeEnergyMinimum minimise_free_energy(Team& team, const double* c, int count, double rest, int L,
                                                double M, double s_limit, double* tails) {
  const Threshold threshold(L, M);
  const double alpha = threshold.alpha;

  if (team.rank() == 0) {
    tails[count] = rest;
    for (int k = count - 1; k >= 0; --k) tails[k] = tails[k + 1] + c[k];
  }
  team.barrier();

  const int most = count < L ? count : count - 1;  // k = L has no tail and is never below L / (1 + alpha)
  for (int k = 0; k <= most; ++k) {
    if (k * (1.0 + alpha) >= L) break;
    if (tails[k] <= 0.0) return {k, 0.0, -INFINITY, INFINITY};
  }

  // How far Omega steps up as s passes a breakpoint.
  const double step = log1p(threshold.tau) + alpha * log1p(threshold.tau / alpha) - threshold.tau;
  FreeEnergyMinimum best = {-1, 0.0, INFINITY, INFINITY};
  // As k goes down, these describe the interval above: its right end, an upper bound of G there, an upper
  // bound of "the lowest right end from there up" minus Omega at its own right end, and the place of
  // that lowest right end.
  double right_above = INFINITY, slope_above = INFINITY, lead_above = INFINITY;
  int lowest_k = 0;
  double lowest_s = 0.0;

  for (int k = most; k >= 0; --k) {
    if (k * (1.0 + alpha) >= L) continue;  // G_k > 0 everywhere, so there is no minimum
    const double left = k > 0 ? threshold.x / c[k - 1] : 0.0;
    double right = k < count ? threshold.x / c[k] : s_limit;
    if (right > s_limit) right = s_limit;
    const bool empty = !(right > left);  // no sigma^2 puts the threshold between equal values
    const FreeEnergyPiece<Team> piece = {team, c, threshold, k, tails[k], double(L)};

    // 0 < 1 / tau < 1 / tau_ bounds G_k without a loop.
    const double floor = alpha * k - (L - k);
    double slope_here = right * tails[k] + floor + alpha * k / threshold.tau;
    bool ends_low = slope_here <= 0.0;  // Omega still falls at the right end
    double position = 0.0;
    if (!empty && !ends_low && left * tails[k] + floor <= 0.0) {
      const auto exact = piece.slope(right);
      slope_here = exact.value;
      ends_low = exact.value <= 0.0;
      if (!ends_low) position = piece.root_left_of(right, exact, left);
    }

    // A right end is a candidate unless one further right is surely lower, by more than the largest error
    // can move it. G is convex on the interval above, so the larger of its end values bounds G in
    // between.
    double lead = INFINITY;
    if (right_above < INFINITY) {
      const double from = slope_here - threshold.tau;  // G just after the breakpoint
      lead = step + log(right_above / right) * (from > slope_above ? from : slope_above) + lead_above;
    }
    if (!empty && lead >= 0.0) {
      lead = 0.0;
      lowest_k = k;
      lowest_s = right;
    }
    if (!empty && ends_low &&
        (lead == 0.0 || lead >= -LARGEST_ERROR * threshold.x / right * swing(k, right, lowest_k, lowest_s))) {
      position = right;
    }
    lead_above = lead;
    right_above = right;
    slope_above = slope_here;

    if (position > 0.0) {
      const double value = piece.free_energy(position);
      const bool wins = best.rank < 0 || value <= best.free_energy + 1e-12 * (1.0 + fabs(best.free_energy));
      // When a new minimum wins, the old one's tolerance against another minimum is still a bound: gaps add
      // up, and swings add up at most.
      double tolerance = best.tolerance;
      if (best.rank >= 0) {
        const double bearable =
            fabs(value - best.free_energy) / swing(k, position, best.rank, 1.0 / best.noise_variance);
        if (bearable < tolerance) tolerance = bearable;
      }
      if (wins) best = {k, 1.0 / position, value, tolerance};
      best.tolerance = tolerance;
    }
  }
  return best;
}

}  // namespace rmsgd
