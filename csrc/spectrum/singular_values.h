// Singular values of a weight without its Gram matrix, in fp64 by a team: the accuracy guard's last resort.
//
// Squaring loses what is below sqrt(u) of the largest singular value. Here A^T is reduced to a
// triangle R by Householder reflections, as many rows at a time as R has, R to a bidiagonal B, and the
// eigenvalues of [0 B^T; B 0], which is tridiagonal after a permutation, are plus and minus the
// singular values. Error: a small multiple of u times the largest.
//
// Hardly any weight gets here, so one block takes them one after the other and the workspace is that
// of one matrix. 512 x 4608: .1 s on an H100-class card, about 1 s on sm_75 with fp64 at 1/32 rate.
#pragma once

#include "sturm.h"

namespace rmsgd {

// x holds `count` elements, one every `step`; they become v (v_1 = 1 is not stored: x_1 becomes beta), and
// tau is returned.
template <class Team>
RMSGD_FN double reflect(Team& team, double* x, long long step, int count) {
  double squares = 0.0;
  for (int i = 1 + team.rank(); i < count; i += team.size()) squares += x[i * step] * x[i * step];
  squares = team.sum(squares);
  const double alpha = x[0];
  if (squares < 1e-290) return 0.0;
  const double norm = sqrt(alpha * alpha + squares), beta = alpha > 0.0 ? -norm : norm;
  team.barrier();  // all have read alpha
  for (int i = 1 + team.rank(); i < count; i += team.size()) x[i * step] /= alpha - beta;
  if (team.rank() == 0) x[0] = beta;
  team.barrier();
  return (beta - alpha) / beta;
}

// R (n, n), upper triangular, becomes the triangle of the QR decomposition of [R; B], B (rows, n) is
// destroyed. Both row-major and shared.
template <class Team>
RMSGD_FN void append_rows(Team& team, double* R, double* B, int rows, int n) {
  for (int j = 0; j < n; ++j) {
    // The reflection of column j meets row j of R and all of B.
    double squares = 0.0;
    for (int r = team.rank(); r < rows; r += team.size()) squares += B[r * n + j] * B[r * n + j];
    squares = team.sum(squares);
    if (squares < 1e-290) continue;
    const double alpha = R[(long long)j * n + j];
    const double norm = sqrt(alpha * alpha + squares), beta = alpha > 0.0 ? -norm : norm;
    const double factor = 1.0 / (alpha - beta), tau = (beta - alpha) / beta;
    for (int k = j + 1 + team.rank(); k < n; k += team.size()) {
      double dot = 0.0;
      for (int r = 0; r < rows; ++r) dot += B[r * n + j] * B[r * n + k];
      const double scaled = tau * (R[(long long)j * n + k] + factor * dot);
      R[(long long)j * n + k] -= scaled;
      for (int r = 0; r < rows; ++r) B[r * n + k] -= scaled * factor * B[r * n + j];
    }
    team.barrier();
    if (team.rank() == 0) R[(long long)j * n + j] = beta;
  }
  team.barrier();
}

// Reduces R (n, n) to a bidiagonal: diagonal (n) and off_diagonal (n - 1).
template <class Team>
RMSGD_FN void bidiagonalise(Team& team, double* R, int n, double* diagonal, double* off_diagonal) {
  for (int k = 0; k < n; ++k) {
    double* const corner = R + (long long)k * n + k;
    const double left = reflect(team, corner, n, n - k);
    for (int c = 1 + team.rank(); c < n - k; c += team.size()) {
      double dot = corner[c];
      for (int r = 1; r < n - k; ++r) dot += corner[(long long)r * n] * corner[(long long)r * n + c];
      dot *= left;
      corner[c] -= dot;
      for (int r = 1; r < n - k; ++r) corner[(long long)r * n + c] -= dot * corner[(long long)r * n];
    }
    team.barrier();
    if (team.rank() == 0) diagonal[k] = corner[0];
    if (k + 1 == n) break;
    double* const next = corner + 1;
    const double right = reflect(team, next, 1, n - k - 1);
    for (int r = 1 + team.rank(); r < n - k; r += team.size()) {
      double* const row = next + (long long)r * n;
      double dot = row[0];
      for (int c = 1; c < n - k - 1; ++c) dot += next[c] * row[c];
      dot *= right;
      row[0] -= dot;
      for (int c = 1; c < n - k - 1; ++c) row[c] -= dot * next[c];
    }
    if (team.rank() == 0) off_diagonal[k] = next[0];
    team.barrier();
  }
  team.barrier();
}

// Doubles of scratch for matrices with a smaller side of up to L, and ints after them.
RMSGD_FN long long singular_values_scratch(long long L) { return 2 * L * L + 10 * L + 8; }
RMSGD_FN int singular_values_counts(int L, int members) { return sturm_counts(L, members); }

// gamma: the L singular values, descending, of the matrix whose transpose has the rows that
// row(r, c), r < M, c < L, gives; scaled to a largest element near 1.
template <class Team, class Row>
RMSGD_FN void singular_values(Team& team, const Row& row, int L, long long M, double* gamma, double* scratch,
                              int* counts) {
  double* const R = scratch;
  double* const B = R + (long long)L * L;
  double* const diagonal = B + (long long)L * L;
  double* const off_diagonal = diagonal + L;
  double* const zeros = off_diagonal + L;
  double* const squares = zeros + 2 * L;
  double* const low = squares + 2 * L;
  double* const high = low + L;

  for (long long i = team.rank(); i < (long long)L * L; i += team.size()) R[i] = 0.0;
  for (long long start = 0; start < M; start += L) {
    const int rows = M - start < L ? int(M - start) : L;
    for (int i = team.rank(); i < rows * L; i += team.size()) B[i] = row(start + i / L, i % L);
    team.barrier();
    append_rows(team, R, B, rows, L);
  }
  bidiagonalise(team, R, L, diagonal, off_diagonal);

  double upper = 0.0;
  for (int i = team.rank(); i < L; i += team.size()) {
    const double d = fabs(diagonal[i]), e = i + 1 < L ? fabs(off_diagonal[i]) : 0.0;
    const double before = i > 0 ? fabs(off_diagonal[i - 1]) : 0.0;
    zeros[2 * i] = zeros[2 * i + 1] = 0.0;
    squares[2 * i] = d * d;
    squares[2 * i + 1] = e * e;  // the last one is beyond the matrix
    const double bound = d + (e > before ? e : before);
    if (bound > upper) upper = bound;
  }
  upper = team.max(upper) * 1.000001;
  largest_eigenvalues(team, zeros, squares, 2 * L, L, 0.0, upper, low, high, counts, gamma);
}

}  // namespace rmsgd
