// The EVBMF noise variance: the global minimiser of the free energy, exactly.
//
// Nakajima, Sugiyama, Babacan, Tomioka, "Global analytic solution of fully-observed variational
// Bayesian matrix factorization", JMLR 14 (2013). For an L x M matrix (L <= M) with singular values
// gamma_h, write c_h = gamma_h^2 / M, alpha = L / M, x_h = c_h / sigma^2, s = 1 / sigma^2 and
//
//   Omega(sigma^2) = sum_h x_h + L log sigma^2
//                    + sum over x_h > x_ of  log(tau + 1) + alpha log(tau / alpha + 1) - tau
//   tau(x) = (x - (1 + alpha) + sqrt((x - (1 + alpha))^2 - 4 alpha)) / 2
//   tau_ = 2.5129 sqrt(alpha),  x_ = (1 + tau_)(1 + alpha / tau_)
//
// Omega has many local minima. Between two neighbouring breakpoints (x_ / c_k, x_ / c_{k+1}] the
// set of values above the threshold is fixed (k of them), and
//
//   G_k(s) = s dOmega/ds = s T_k - (L - k) + alpha sum_{h<=k} (1 + 1 / tau(c_h s)),
//   T_k = sum_{h>k} c_h,
//
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

struct FreeEnergyMinimum {
  int rank;               // how many values are above the threshold: the winning k
  double noise_variance;  // sigma^2, in the units of c
  double free_energy;     // Omega there
  double gap;             // Omega of the best candidate of another rank minus free_energy (inf: none)
};

// The global minimum over sigma^2.
//
//   c, count   the `count` largest of the L values, descending
//   rest       the sum of the L - count values not given (0 when count == L)
//   s_limit    no minimum has 1 / sigma^2 above this; infinity when count == L. With count < L every
//              value not given must be at or below x_ / s_limit.
//   scratch    2 * (count + 1) doubles, shared by the team
//
// A total of zero gives rank 0 and sigma^2 = 0. The rank returned is below L / (1 + alpha).
template <class Team>
RMSGD_FN FreeEnergyMinimum minimise_free_energy(Team& team, const double* c, int count, double rest, int L,
                                                double M, double s_limit, double* scratch);

}  // namespace rmsgd
