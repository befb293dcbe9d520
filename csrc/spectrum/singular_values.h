// Singular values of a weight without its Gram matrix, in fp64 by a team: the accuracy guard's last resort.
//
// Squaring loses what is below sqrt(u) of the largest singular value. Here A^T is reduced to a
// triangle R by Householder reflections, many rows at a time, R to a bidiagonal B, and the
// eigenvalues of [0 B^T; B 0], which is tridiagonal after a permutation, are plus and minus the
// singular values. Error: a small multiple of u times the largest.
//
// Hardly any weight gets here, so a grid takes them one after the other, and the workspace is that of one
// matrix. Counted: 24 bytes of traffic for each of the M L^2 / 2 + 2 L^3 / 3 elements met, and the team waits
// M max(1, L / svd_rows) + 3 L times.
#pragma once

#include "sturm.h"

namespace rmsgd {

// H = 1 - scale v v^T, with v = x but for v_1 = first, turns x into (beta, 0, ..., 0).
struct Reflection {
  double first, scale, beta;
};

// From x_1 and the sum of the squares of the others. Where those are as good as zero, H = 1.
RMSGD_FN Reflection reflection(double x, double squares) {
  if (squares < 1e-290) return {0.0, 0.0, x};
  const double norm = sqrt(x * x + squares);
  return {x > 0.0 ? x + norm : x - norm, 1.0 / (norm * (norm + fabs(x))), x > 0.0 ? -norm : norm};
}

// The v of a reflection, of which memory has x.
struct Reflector {
  double first;
  const double* x;
  RMSGD_FN double operator[](int i) const { return i == 0 ? first : x[i]; }
};

// Elements that a member loads before it uses the first one.
constexpr int SVD_AHEAD = 8;

// One member's part of x . v, the elements from, from + step, ...: x has `count` of them, `stride` apart.
template <class Vector>
RMSGD_FN double dot(const double* x, int stride, const Vector& v, int from, int step, int count) {
  double sum = 0.0;
  int i = from;
  for (; i + (SVD_AHEAD - 1) * step < count; i += SVD_AHEAD * step) {
    double a[SVD_AHEAD], b[SVD_AHEAD];
#pragma unroll
    for (int k = 0; k < SVD_AHEAD; ++k) {
      a[k] = x[(i + k * step) * stride];
      b[k] = v[i + k * step];
    }
#pragma unroll
    for (int k = 0; k < SVD_AHEAD; ++k) sum += a[k] * b[k];
  }
  for (; i < count; i += step) sum += x[i * stride] * v[i];
  return sum;
}

// The same elements of x -= factor v.
template <class Vector>
RMSGD_FN void subtract(double* x, int stride, double factor, const Vector& v, int from, int step, int count) {
  int i = from;
  for (; i + (SVD_AHEAD - 1) * step < count; i += SVD_AHEAD * step) {
    double next[SVD_AHEAD];
#pragma unroll
    for (int k = 0; k < SVD_AHEAD; ++k) next[k] = x[(i + k * step) * stride] - factor * v[i + k * step];
#pragma unroll
    for (int k = 0; k < SVD_AHEAD; ++k) x[(i + k * step) * stride] = next[k];
  }
  for (; i < count; i += step) x[i * stride] -= factor * v[i];
}

// R (n, n), upper triangular, becomes the triangle of the QR decomposition of [R; B], B (rows, n) is
// destroyed. Both shared and column-major: a group has a whole column, so that all meet once per reflection.
template <class Team>
RMSGD_FN void append_rows(Team& team, double* R, double* B, int rows, int n) {
  auto group = team.group();
  double squares = team.sum(dot(B, 1, B, team.rank(), team.size(), rows));
  for (int j = 0; j < n; ++j) {
    // The reflection of column j meets row j of R and all of B.
    const double* const v = B + (long long)j * rows;
    const Reflection H = reflection(R[(long long)j * n + j], squares);
    squares = 0.0;
    for (int c = j + 1 + team.group_number(); c < n; c += team.groups()) {
      double* const column = B + (long long)c * rows;
      double* const top = R + (long long)c * n + j;
      const double x = *top;
      const double factor =
          H.scale * (H.first * x + group.sum(dot(column, 1, v, group.rank(), group.size(), rows)));
      subtract(column, 1, factor, v, group.rank(), group.size(), rows);
      if (group.rank() == 0) *top = x - factor * H.first;
      if (c == j + 1) squares = dot(column, 1, column, group.rank(), group.size(), rows);
    }
    squares = team.sum(squares);
    if (team.rank() == 0) R[(long long)j * n + j] = H.beta;
  }
  team.barrier();
}

// Parts of a row's product with a reflector that are summed in a fixed order.
constexpr int ROW_PARTS = 32;

// Reduces A (n, n), column-major, to a bidiagonal: diagonal (n) and off_diagonal (n - 1). row (n) and
// partial (svd_rows, n) are scratch. All of it shared. The team waits three times per row.
template <class Team>
RMSGD_FN void bidiagonalise(Team& team, double* A, int n, double* row, double* partial, double* diagonal,
                            double* off_diagonal) {
  auto group = team.group();
  double squares = team.sum(dot(A + 1, 1, A + 1, team.rank(), team.size(), n - 1));
  for (int k = 0; k < n; ++k) {
    // From the left: columns from k + 1 on, each a group's. Row k is final then, and moves to `row`.
    double* const corner = A + (long long)k * n + k;
    const Reflection left = reflection(*corner, squares);
    const Reflector v = {left.first, corner};
    squares = 0.0;
    for (int c = k + 1 + team.group_number(); c < n; c += team.groups()) {
      double* const column = A + (long long)c * n + k;
      const double factor = left.scale * group.sum(dot(column, 1, v, group.rank(), group.size(), n - k));
      subtract(column, 1, factor, v, group.rank(), group.size(), n - k);
      if (group.rank() == 0) {
        row[c] = *column;
        if (c > k + 1) squares += *column * *column;
      }
    }
    squares = team.sum(squares);
    if (team.rank() == 0) diagonal[k] = left.beta;
    if (k + 1 == n) break;

    // From the right: neighbouring members have neighbouring rows, and every part-th column of them.
    const int rest = n - k - 1;
    const Reflection right = reflection(row[k + 1], squares);
    const Reflector u = {right.first, row + k + 1};
    int parts = team.size() / rest;
    if (parts > ROW_PARTS) parts = ROW_PARTS;
    if (parts > rest) parts = rest;
    if (parts < 1) parts = 1;
    double* const below = corner + n + 1;
    for (int turn = team.rank(); turn < parts * rest; turn += team.size()) {
      const int part = turn / rest, r = turn % rest;
      partial[turn] = dot(below + r, n, u, part, parts, rest);
    }
    team.barrier();
    squares = 0.0;
    for (int turn = team.rank(); turn < parts * rest; turn += team.size()) {
      const int part = turn / rest, r = turn % rest;
      double product = 0.0;
      for (int p = 0; p < parts; ++p) product += partial[p * rest + r];
      subtract(below + r, n, right.scale * product, u, part, parts, rest);
      if (part == 0 && r > 0) squares += below[r] * below[r];
    }
    squares = team.sum(squares);
    if (team.rank() == 0) off_diagonal[k] = right.beta;
  }
  team.barrier();
}

// Rows of the transpose that are reduced at a time: L, but no more than 8 MB.
RMSGD_FN long long svd_rows(long long L) { return L <= 1024 ? L : 1024 * 1024 / L; }

// Doubles of scratch for matrices with a smaller side of up to L, and ints after them.
RMSGD_FN long long singular_values_scratch(long long L) { return L * L + svd_rows(L) * L + 9 * L; }
RMSGD_FN int singular_values_counts(int L, int members) { return sturm_counts(L, members); }

// gamma: the L singular values, descending, of the matrix whose transpose has the rows that
// row(r, c), r < M, c < L, gives; scaled to a largest element near 1.
template <class Team, class Row>
RMSGD_FN void singular_values(Team& team, const Row& row, int L, long long M, double* gamma, double* scratch,
                              int* counts) {
  double* const R = scratch;
  double* const B = R + (long long)L * L;
  const int at_a_time = int(svd_rows(L));
  double* const diagonal = B + (long long)at_a_time * L;
  double* const off_diagonal = diagonal + L;
  double* const zeros = off_diagonal + L;
  double* const squares = zeros + 2 * L;
  double* const low = squares + 2 * L;
  double* const high = low + L;
  double* const last_row = high + L;

  for (long long i = team.rank(); i < (long long)L * L; i += team.size()) R[i] = 0.0;
  for (long long start = 0; start < M; start += at_a_time) {
    const int rows = M - start < at_a_time ? int(M - start) : at_a_time;
    for (int i = team.rank(); i < rows * L; i += team.size()) B[i] = row(start + i % rows, i / rows);
    team.barrier();
    append_rows(team, R, B, rows, L);
  }
  bidiagonalise(team, R, L, last_row, B, diagonal, off_diagonal);

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
  largest_eigenvalues(team, zeros, squares, 2 * L, 0, L, 0.0, upper, low, high, counts, gamma);
}

}  // namespace rmsgd
