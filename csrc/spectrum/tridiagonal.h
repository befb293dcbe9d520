// Reduction of a symmetric matrix to tridiagonal form by a team, keeping its eigenvalues.
//
// Householder reflections H = 1 - tau v v^T, one per row. Applying one to both sides is
// A <- A - v w^T - w v^T with p = tau A v and w = p - (tau / 2)(p . v) v. Row j + 1 of the result is all that
// the next reflection needs, so the update is put off and joined with the product A v of the next
// reflection: the rest of the matrix is read and written once per row, and the team meets three times.
//
// Counted, not measured: 8 bytes of traffic for each of the n^3 / 3 elements met (fp32), 3 n meetings. With
// one block and the matrix in half of a multiprocessor's shared memory (n <= 88 on sm_75, 168 on sm_90)
// a meeting costs .1 us. Over the second-level cache a multiprocessor moves about 100 GB/s (sm_75: 60),
// and blocks meet in 1.2 us: n = 256 in one block .5 ms (sm_75 .8), n = 512 in 8 blocks 2.3 ms (2.6), n =
// 1024 in 16 blocks 5.5 ms (6.7). A network, in waves of 264 blocks on an H100 and of 136 on an RTX 2080 Ti
// (two to a multiprocessor) as rmsgd/backends/cuda_teams.py divides it:
//
//   ms             H100               RTX 2080 Ti
//   ResNet18       2.3  (2.4)         2.6  (6)
//   ResNet34       2.3  (2.8)         2.6  (10)
//   ResNet50       5.5  (5.5)         7.5  (18)
//   ResNet101      5.5  (5.8)         7.5  (23)
//   MobileNetV2    1.0  (1.0)         1.6  (1.6)
//   ViT-B/16       9    (23)          18   (110)
//
// In brackets with the limits that all multiprocessors share: a cache of 50 MB that moves 5.5 TB/s (5.5 MB,
// 2.1 TB/s) and, for what a wave has beyond its size, memory at 3 TB/s (.55). Waves small enough for the
// cache would take as long. In fp64 at 1/32 rate all of it would take 20 times as long there: only what
// the fp32 Gram matrices cannot decide goes that way.
#pragma once

#include "../element.h"

namespace rmsgd {

// What the team knows of row i during a reflection: v and w of the reflection that is still to be
// applied, and the row from which the next one is made.
template <class T>
struct alignas(16) Reflected {
  T v, w, next, unused;
};

// Parts of the product A v that are summed in a fixed order.
constexpr int PRODUCT_PARTS = 32;

// Elements of T that the reduction needs besides the matrix.
RMSGD_FN int tridiagonal_vectors(int stride) { return (4 + PRODUCT_PARTS) * stride; }

// matrix: symmetric (n, n), full storage, rows `stride` apart (n rounded up to a multiple of 4), 16-byte
// aligned; destroyed. Its norm should be about 1. An int counts its elements, for want of registers.
// vectors: tridiagonal_vectors(stride) elements of scratch, 16-byte aligned.
// diagonal (n) and off_diagonal (n - 1) are the result. All of it is shared by the team, and what other
// members wrote before the call is visible.
template <class T, class Team>
RMSGD_FN void tridiagonalise(Team& team, T* matrix, int n, int stride, T* vectors, T* diagonal,
                             T* off_diagonal) {
  constexpr int WIDE = 4;   // columns of one access
  constexpr int AHEAD = 3;  // rows loaded before the first is used
  typedef Pack<T, WIDE> Wide;
  // Squares below this are lost beside a matrix of norm 1.
  const T negligible = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
  Reflected<T>* const rows = reinterpret_cast<Reflected<T>*>(vectors);
  T* const partial = vectors + 4 * stride;

  // The pending reflection: v_i is 1 at its first row and rows[i].next * factor below.
  T tau = 0, factor = 0;
  int parts = 0;
  for (int j = 0; j < n; ++j) {
    // y = A v, and y . v
    T dot = 0;
    for (int i = j + team.rank(); i < n && parts > 0; i += team.size()) {
      T y = 0;
      for (int part = 0; part < parts; ++part) y += partial[part * stride + i];
      rows[i].w = y;
      dot += y * (i == j ? T(1) : rows[i].next * factor);
    }
    dot = team.sum(dot);
    T first = 0;
    for (int part = 0; part < parts; ++part) first += partial[part * stride + j];
    const T shift = T(0.5) * tau * tau * dot;
    const T w_j = tau * first - shift;

    // Row j with the pending reflection applied.
    const bool pending = parts > 0;
    T squares = 0;
    for (int i = j + team.rank(); i < n; i += team.size()) {
      const T v = !pending ? T(0) : i == j ? T(1) : rows[i].next * factor;
      const T w = !pending ? T(0) : tau * rows[i].w - shift * v;
      const T next = matrix[j * stride + i] - (pending ? w + w_j * v : T(0));
      if (i == j) diagonal[j] = next;
      if (i >= j + 2) squares += next * next;
      rows[i] = {v, w, next, T(0)};
    }
    squares = team.sum(squares);
    if (j + 1 == n) break;

    // The reflection that turns (next_{j+1}, ...) into (beta, 0, ...).
    const T alpha = rows[j + 1].next;
    T beta = alpha;
    tau = factor = 0;
    if (squares >= negligible) {
      beta = alpha > T(0) ? -sqrt(alpha * alpha + squares) : sqrt(alpha * alpha + squares);
      factor = T(1) / (alpha - beta);
      tau = (beta - alpha) / beta;
    }
    if (team.rank() == 0) off_diagonal[j] = beta;

    // The pending update and the new product in one pass over rows and columns from j + 1 on.
    const int left = (j + 1) / WIDE * WIDE;
    const int columns = (stride - left) / WIDE;
    parts = team.size() / columns;
    if (parts > PRODUCT_PARTS) parts = PRODUCT_PARTS;
    if (parts > n - j - 1) parts = n - j - 1;
    if (parts < 1) parts = 1;
    for (int turn = team.rank(); turn < parts * columns; turn += team.size()) {
      const int part = turn / columns;
      const int column = left + (turn - part * columns) * WIDE;
      Wide v, w, product;
      for (int c = 0; c < WIDE; ++c) {
        // Columns that the reduction has passed, or that only fill up the row, stay out of it.
        const bool live = column + c > j && column + c < n;
        v.value[c] = live ? rows[column + c].v : T(0);
        w.value[c] = live ? rows[column + c].w : T(0);
        product.value[c] = 0;
      }
      T* const at = matrix + column;
      for (int row = j + 1 + part; row < n; row += AHEAD * parts) {
        Wide a[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          if (row + k * parts < n) a[k].load(at + (row + k * parts) * stride, true);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          const int r = row + k * parts;
          if (r >= n) continue;
          const Reflected<T> here = rows[r];
          const T scale = r == j + 1 ? T(1) : here.next * factor;
#pragma unroll
          for (int c = 0; c < WIDE; ++c) {
            a[k].value[c] -= here.v * w.value[c] + here.w * v.value[c];
            product.value[c] += a[k].value[c] * scale;
          }
          a[k].store(at + r * stride, true);
        }
      }
      product.store(partial + part * stride + column, true);
    }
    team.barrier();
  }
}

}  // namespace rmsgd
