#include "deflate_cpu.h"

#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

constexpr int W = LANES<double>;

// A value is large if it is so many times the mean of the others. With smaller ones the guard passes as a
// rule.
constexpr double LARGE = 32.0;
constexpr int MOST_ROUNDS = 8, MOST_WIDE_ROUNDS = 4;

// The part of Y = G X that rows [row, row + count) of the upper triangle make up, by single elements of
// columns [row, end).
template <int K>
void multiply_corner(const double* gram, ptrdiff_t row, ptrdiff_t count, ptrdiff_t end, ptrdiff_t stride,
                     const double* X, double* Y) {
  for (ptrdiff_t i = row; i < row + count; ++i) {
    for (ptrdiff_t j = i; j < end; ++j) {
      const double g = gram[i * stride + j];
      for (int c = 0; c < K; ++c) {
        Y[c * stride + i] += g * X[c * stride + j];
        if (j > i) Y[c * stride + j] += g * X[c * stride + i];
      }
    }
  }
}

// Y = G X from the upper triangle, four rows at a time, which stay in the first-level cache while all of X
// and Y passes. X and Y are K rows of length n, `stride` apart, zero beyond n.
template <int K>
void multiply(const double* gram, ptrdiff_t n, ptrdiff_t stride, const double* X, double* Y) {
  constexpr ptrdiff_t ROWS = 4;
  for (ptrdiff_t i = 0; i < K * stride; ++i) Y[i] = 0.0;
  ptrdiff_t row = 0;
  for (; row + ROWS <= n; row += ROWS) {
    const ptrdiff_t first = vectors_up<double>(row + ROWS) < n ? vectors_up<double>(row + ROWS) : n;
    multiply_corner<K>(gram, row, ROWS, first, stride, X, Y);
    const double* const from = gram + row * stride;
    for (int c = 0; c < K && first < n; ++c) {
      const double* const x = X + c * stride;
      double* const y = Y + c * stride;
      const double scale[ROWS] = {x[row], x[row + 1], x[row + 2], x[row + 3]};
      Vector<double> sums[ROWS] = {};
      for (ptrdiff_t j = first; j < n; j += W) {
        const Vector<double> right = load(x + j);
        Vector<double> below = load(y + j);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          const Vector<double> g = load(from + r * stride + j);
          sums[r] += g * right;
          below += g * scale[r];
        }
        store(y + j, below);
      }
      for (int r = 0; r < ROWS; ++r) y[row + r] += horizontal_sum<double>(sums[r]);
    }
  }
  multiply_corner<K>(gram, row, n - row, n, stride, X, Y);
}

double dot(const double* x, const double* y, ptrdiff_t length) {
  Vector<double> sum = {};
  for (ptrdiff_t j = 0; j < length; j += W) sum += load(x + j) * load(y + j);
  return horizontal_sum<double>(sum);
}

// Makes the vectors orthonormal by Gram-Schmidt, twice. Returns false if one of them is not a number or
// depends on those before it.
template <int K>
bool orthonormalise(double* X, ptrdiff_t stride) {
  for (int c = 0; c < K; ++c) {
    double* const x = X + c * stride;
    for (int round = 0; round < 2; ++round) {
      for (int k = 0; k < c; ++k) {
        const double* const other = X + k * stride;
        const double part = dot(x, other, stride);
        for (ptrdiff_t j = 0; j < stride; ++j) x[j] -= part * other[j];
      }
      const double square = dot(x, x, stride);
      if (!(square > 1e-280 && square < 1e280)) return false;
      const double factor = 1.0 / __builtin_sqrt(square);
      for (ptrdiff_t j = 0; j < stride; ++j) x[j] *= factor;
    }
  }
  return true;
}

// H (K, K) = Q diag Q^T by Jacobi's rotations; the columns of Q in the order of descending values.
template <int K>
void eigenvectors(double (&H)[K][K], double (&Q)[K][K]) {
  for (int i = 0; i < K; ++i) {
    for (int j = 0; j < K; ++j) Q[i][j] = i == j;
  }
  bool settled = false;
  for (int sweep = 0; sweep < 10 && !settled; ++sweep) {
    settled = true;
    for (int p = 0; p < K; ++p) {
      for (int q = p + 1; q < K; ++q) {
        if (__builtin_fabs(H[p][q]) <= 1e-17 * __builtin_sqrt(__builtin_fabs(H[p][p] * H[q][q]))) continue;
        settled = false;
        const double theta = (H[q][q] - H[p][p]) / (2.0 * H[p][q]);
        const double t =
            (theta < 0.0 ? -1.0 : 1.0) / (__builtin_fabs(theta) + __builtin_sqrt(theta * theta + 1.0));
        const double c = 1.0 / __builtin_sqrt(t * t + 1.0), s = t * c;
        for (int k = 0; k < K; ++k) {
          const double a = H[k][p], b = H[k][q];
          H[k][p] = c * a - s * b;
          H[k][q] = s * a + c * b;
        }
        for (int k = 0; k < K; ++k) {
          const double a = H[p][k], b = H[q][k];
          H[p][k] = c * a - s * b;
          H[q][k] = s * a + c * b;
        }
        for (int k = 0; k < K; ++k) {
          const double a = Q[k][p], b = Q[k][q];
          Q[k][p] = c * a - s * b;
          Q[k][q] = s * a + c * b;
        }
      }
    }
  }
  for (int i = 0; i < K; ++i) {
    int largest = i;
    for (int j = i + 1; j < K; ++j) {
      if (H[j][j] > H[largest][largest]) largest = j;
    }
    if (largest == i) continue;
    const double value = H[i][i];
    H[i][i] = H[largest][largest];
    H[largest][largest] = value;
    for (int k = 0; k < K; ++k) {
      const double q = Q[k][i];
      Q[k][i] = Q[k][largest];
      Q[k][largest] = q;
    }
  }
}

template <int K>
void rotate(double* X, ptrdiff_t stride, const double (&Q)[K][K]) {
  for (ptrdiff_t j = 0; j < stride; j += W) {
    Vector<double> old[K], next[K] = {};
    for (int c = 0; c < K; ++c) old[c] = load(X + c * stride + j);
    for (int c = 0; c < K; ++c) {
      for (int k = 0; k < K; ++k) next[c] += old[k] * Q[k][c];
    }
    for (int c = 0; c < K; ++c) store(X + c * stride + j, next[c]);
  }
}

// n sum lambda^2 / trace^2.
double inequality(const double* gram, int n, ptrdiff_t stride, double trace) {
  double squares = 0.0;
  for (ptrdiff_t i = 0; i < n; ++i) {
    const double* const row = gram + i * stride;
    double sum = 0.5 * row[i] * row[i];
    ptrdiff_t j = i + 1;
    for (; j % W != 0 && j < n; ++j) sum += row[j] * row[j];
    Vector<double> sums = {};
    for (; j < n; j += W) sums += load(row + j) * load(row + j);
    squares += 2.0 * (sum + horizontal_sum<double>(sums));
  }
  return squares * n / (trace * trace);
}

// Signs, the same every time.
class Signs {
 public:
  void fill(double* x, ptrdiff_t n, ptrdiff_t stride) {
    for (ptrdiff_t j = 0; j < stride; ++j) {
      state_ = state_ * 1664525u + 1013904223u;
      x[j] = j >= n ? 0.0 : state_ >> 31 ? 1.0 : -1.0;
    }
  }

 private:
  uint32_t state_ = 12345;
};

// What an iteration knows of its K vectors, rows of X (Y holds G X): their Ritz values, descending, and |r|^2
// of the residuals of the large ones.
struct Ritz {
  double values[MOST_DEFLATED], residuals[MOST_DEFLATED];
  int large, settled;  // as many of them; what couples the settled ones counts for less than roundoff
};

constexpr int ROUNDS_TO_TELL = 2;

// Subspace iteration from X on, until all large values are settled, or until it is known that all K are large
// and more can be looked for. Returns false if a vector is not a number.
template <int K>
bool iterate(const double* gram, int n, ptrdiff_t stride, double trace, double* X, double* Y, Ritz& ritz) {
  constexpr bool wider = K < MOST_DEFLATED;
  for (int round = 1;; ++round) {
    ritz.large = ritz.settled = 0;
    if (!orthonormalise<K>(X, stride)) return false;
    multiply<K>(gram, n, stride, X, Y);
    double H[K][K], Q[K][K];
    for (int a = 0; a < K; ++a) {
      for (int b = a; b < K; ++b) H[a][b] = H[b][a] = dot(X + a * stride, Y + b * stride, stride);
    }
    eigenvectors(H, Q);
    rotate(X, stride, Q);
    rotate(Y, stride, Q);
    double rest = trace;
    for (int c = 0; c < K; ++c) {
      ritz.values[c] = H[c][c];
      if (c != ritz.large || !(H[c][c] * (n - c) > LARGE * rest)) continue;
      rest -= H[c][c];
      ++ritz.large;
    }
    for (int c = 0; c < ritz.large; ++c) {
      double square = 0.0;
      for (ptrdiff_t j = 0; j < n; ++j) {
        const double r = Y[c * stride + j] - H[c][c] * X[c * stride + j];
        square += r * r;
      }
      ritz.residuals[c] = square;
      if (c == ritz.settled && square < 0x1p-24 * H[c][c] * rest / n) ++ritz.settled;
    }
    if (round >= ROUNDS_TO_TELL && (ritz.settled == ritz.large || (wider && ritz.large == K))) return true;
    if (round > (wider ? MOST_ROUNDS : MOST_WIDE_ROUNDS)) return true;
    for (ptrdiff_t j = 0; j < K * stride; ++j) X[j] = Y[j];
  }
}

}  // namespace

Deflation deflate(double* gram, int n, ptrdiff_t stride, double trace, double least, double* left,
                  double* work) {
  Deflation result = {false, 0, {}, 0.0};
  if (!(inequality(gram, n, stride, trace) > least)) return result;
  result.looked = true;
  for (ptrdiff_t i = 0; i < n; ++i) left[i] = 1.0;
  double* const X = work;
  double* const Y = work + MOST_DEFLATED * stride;
  Signs signs;
  for (int c = 0; c < FEW_DEFLATED; ++c) signs.fill(X + c * stride, n, stride);
  Ritz ritz;
  if (!iterate<FEW_DEFLATED>(gram, n, stride, trace, X, Y, ritz)) return result;
  if (ritz.large == FEW_DEFLATED) {
    for (ptrdiff_t j = 0; j < FEW_DEFLATED * stride; ++j) X[j] = Y[j];
    for (int c = FEW_DEFLATED; c < MOST_DEFLATED; ++c) signs.fill(X + c * stride, n, stride);
    if (!iterate<MOST_DEFLATED>(gram, n, stride, trace, X, Y, ritz)) return result;
  }
  result.count = ritz.settled;
  for (int c = 0; c < result.count; ++c) {
    result.values[c] = ritz.values[c];
    result.coupling += ritz.residuals[c];
    const double* const x = X + c * stride;
    for (ptrdiff_t i = 0; i < n; ++i) left[i] = x[i] * x[i] < left[i] ? left[i] - x[i] * x[i] : 0.0;
    double* const y = Y + c * stride;
    for (ptrdiff_t j = 0; j < stride; ++j) y[j] -= 0.5 * ritz.values[c] * x[j];
  }
  // G -= V Z^T + Z V^T with Z = G V - V diag(theta) / 2; blocks on the diagonal are whole.
  const ptrdiff_t end = vectors_up<float>(n);
  for (ptrdiff_t i = 0; i < n && result.count > 0; ++i) {
    for (ptrdiff_t j = i / 16 * 16; j < end; j += W) {
      Vector<double> g = load(gram + i * stride + j);
      for (int c = 0; c < result.count; ++c) {
        g -= X[c * stride + i] * load(Y + c * stride + j) + Y[c * stride + i] * load(X + c * stride + j);
      }
      store(gram + i * stride + j, g);
    }
  }
  return result;
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
