// What a Gram matrix of either precision can tell.
#pragma once

#include "../evbmf/metrics.h"

namespace rmsgd {

// The stage of a Gram matrix whose elements have this type.
template <class T>
RMSGD_FN Stage stage_of() {
  return sizeof(T) == 4 ? STAGE_FP32 : STAGE_FP64;
}

// Unit roundoff of its elements.
RMSGD_FN double roundoff(Stage stage) { return stage == STAGE_FP32 ? 0x1p-24 : 0x1p-53; }

// How far an eigenvalue of a Gram matrix may be off, if `largest` is the largest.
RMSGD_FN double gram_error(Stage stage, double largest) { return 8.0 * roundoff(stage) * largest; }

// How far a reduction by way of a band (band_cpu.h) may have moved an eigenvalue, if this is the mean of
// their squares. It is more than gram_error only where many of them are nearly as large as the largest.
//
// The symmetric matrix of what rounding adds in one panel has a norm of a few u, times the size of the rows
// that it meets, and rounding errors are taken as independent: those of n / BAND panels add up by squares,
// and one that falls into the direction of a small eigenvalue counts for little with a large one. So the
// bound is a multiple of the root mean square. The factor is a measured one: with half of the eigenvalues
// equal to the largest, the worst case that was found, errors were 30 u times it at n = 300 and 43 u at 1024
// and 1500.
RMSGD_FN double band_error(Stage precision, double mean_square) {
  return 64.0 * roundoff(precision) * sqrt(mean_square);
}

// How far the rounding of a product in fp32, as a CPU forms it, may have moved an eigenvalue: |E|_2 of the
// matrix E of its errors. gram_error is a bound for product and reduction together; this one is for the
// product alone, and below it where a few values hold most of the trace.
//
// An entry is a sum in double of sums of 256 products, each formed in fp32 by fused additions in chains of
// 64, whose four results are added up (gram_cpu.h): at most 64 + 4 roundings in a row. Rounding errors are
// taken as independent and of mean 0 (N. J. Higham, T. Mary, SIAM J. Sci. Comput. 41, 2019), each of at most
// u of its partial sum, so of variance u^2 / 3 of its square, and no partial sum in a block b of 256 columns
// exceeds |a_i|_b |a_j|_b. So
//
//   Var E_ij <= (68 / 3) u^2 sum_b |a_i|_b^2 |a_j|_b^2 <= 22.7 u^2 g_ii g_jj
//
// The norm of a symmetric matrix of independent entries is about twice the root of the largest sum of
// variances in a row (A. S. Bandeira, R. van Handel, Annals of Probability 44, 2016): 2 sqrt(22.7) u
// sqrt(g_max trace), 9.6 u.
// Errors of one sign, as in a weight of two levels, are not independent: they are alike in all entries, and
// move the largest value, by less than gram_error, and hardly any other.
RMSGD_FN double product_error(double trace, double largest_diagonal) {
  return 10.0 * roundoff(STAGE_FP32) * sqrt(trace * largest_diagonal);
}

// The same for P E P, where P = 1 - V V^T leaves out what was taken off (deflate_cpu.h), and without the last
// step of that bound. |P E P|_2 is about twice the root of |Mean((P E P)^2)|_2 (A. Bandeira, M. Boedihardjo,
// R. van Handel, Inventiones mathematicae 234, 2023), and, but for terms without a sum over rows,
//
//   Mean((P E P)^2) = 22.7 u^2 P diag(s) P,  s_i = sum_b |a_i|_b^2 sum_j P_jj |a_j|_b^2
//
// A row that is mostly taken off, P_ii < 1/2, adds P_ii s_i to the norm of P diag(s) P at most, and the
// others together the largest s_i among them. So strong rows and columns, which are what is taken off, cost
// nothing. spread: s; left: P_ii.
RMSGD_FN double product_error_of_rest(const double* spread, const double* left, int rows) {
  double largest = 0.0, sum = 0.0;
  for (int i = 0; i < rows; ++i) {
    if (left[i] < 0.5) {
      sum += left[i] * spread[i];
    } else if (spread[i] > largest) {
      largest = spread[i];
    }
  }
  return 10.0 * roundoff(STAGE_FP32) * sqrt(largest + sum);
}

// Whether a trace leaves room on both sides: nothing overflowed, and what underflowed does not matter. Zero
// and NaN leave none.
RMSGD_FN bool in_range(double trace, Stage stage) {
  return stage == STAGE_FP32 ? trace > 0x1p-60 && trace < 0x1p100 : trace > 0x1p-600 && trace < 0x1p900;
}

// A row of the smaller side counts as zero if its square, on the diagonal of a Gram matrix of this trace, is
// at or below this: all such rows together have a norm of M 2^-53 gamma_1 at most (trace <= L gamma_1^2), and
// as many singular values are numerically zero. None counts as zero where so much of an fp32 product may have
// vanished, M 2^-149 of a square, that it could matter.
RMSGD_FN double largest_zero_row(double L, double M, double trace, Stage stage) {
  if (stage == STAGE_FP32 && trace < 0x1p-28) return -1.0;
  return 0x1p-106 * trace * (M / L) * (M / L);
}

}  // namespace rmsgd
