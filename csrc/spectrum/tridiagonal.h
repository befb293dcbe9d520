// Reduction of a symmetric matrix to tridiagonal form by a team, keeping its eigenvalues.
//
// Householder reflections H = 1 - tau v v^T, one per row. Applying one to both sides is
// A <- A - v w^T - w v^T with p = tau A v and w = p - (tau / 2)(p . v) v. Row j + 1 of the result is all that
// the next reflection needs, so the update is put off and joined with the product A v of the next
// reflection: the rest of the matrix is read and written once per row, and the team meets twice: where the
// next row's norm is summed, and where (A v) . v is. A block has columns of its own, so that what its members
// have of a product is summed in its own memory.
//
// Counted, not measured: 8 bytes of traffic for each of the n^3 / 3 elements met (fp32); .9 us a row for what
// waits within a block, and two meetings of blocks, 1.2 us each. Over the second-level cache a
// multiprocessor moves about 100 GB/s (sm_75: 60): n = 256 in one block .7 ms (sm_75 1.0), n = 512 in 8
// blocks 2.1 ms (2.4), n = 1024 in 16 blocks 5.2 ms (6.4). A network, in waves of 264 blocks on an H100 and
// of 136 on an RTX 2080 Ti (two to a multiprocessor, which share its traffic) as
// rmsgd/backends/cuda_teams.py divides it:
//
//   ms             H100               RTX 2080 Ti
//   ResNet18       2.1  (2.2)         2.6  (7)
//   ResNet34       2.2  (2.6)         3.4  (11)
//   ResNet50       5.8  (5.8)         10   (19)
//   ResNet101      6.7  (6.7)         11   (25)
//   MobileNetV2    1.2  (1.2)         1.7  (1.7)
//   ViT-B/16       7.1  (23)          18   (112)
//
// In brackets with the limits that all multiprocessors share: a cache of 50 MB that moves 5.5 TB/s (5.5 MB,
// 2.1 TB/s) and, for a wave beyond its size, memory at 3 TB/s (.55). In fp64 at 1/32 rate all of it would
// take 20 times as long there: only what the fp32 Gram matrices cannot decide goes that way.
#pragma once

#include "../element.h"

namespace rmsgd {

// What the team knows of row i during a reflection: v and w of the reflection that is still to be
// applied, and the row from which the next one is made.
template <class T>
struct alignas(16) Reflected {
  T v, w, next, unused;
};

// Columns that a member updates together.
constexpr int WIDE = 4;

// Elements of T that the reduction needs besides the matrix, shared by the team.
RMSGD_FN int tridiagonal_vectors(int stride) { return 5 * stride; }

// And those that every block needs for itself.
RMSGD_FN int tridiagonal_parts(int stride, int members) {
  return members * WIDE > stride ? members * WIDE : stride;
}

// matrix: symmetric (n, n), full storage, rows `stride` apart (n rounded up to a multiple of 4), 16-byte
// aligned; destroyed. Its norm should be about 1. An int counts its elements, for want of registers.
// vectors: tridiagonal_vectors(stride) elements of scratch, 16-byte aligned. parts: tridiagonal_parts(stride,
// members of a block) elements, 16-byte aligned, of the block: in shared memory where there is such.
// tridiagonal is the result: the diagonal (n) and, from element `stride` on, the off-diagonal (n - 1). All
// but parts is shared by the team, and what other members wrote before the call is visible.
template <class T, class Team>
RMSGD_FN void tridiagonalise(Team& team, T* matrix, int n, int stride, T* vectors, T* parts, T* tridiagonal) {
  constexpr int AHEAD = 3;  // rows loaded before the first is used
  typedef Pack<T, WIDE> Wide;
  // Squares below this are lost beside a matrix of norm 1.
  const T negligible = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
  Reflected<T>* const rows = reinterpret_cast<Reflected<T>*>(vectors);
  T* const product = vectors + 4 * stride;
  auto& block = team.block();

  // The pending reflection: v_i is 1 at its first row and rows[i].next * factor below; y = A v is `product`.
  T tau = 0, factor = 0, product_v = 0;
  for (int j = 0; j < n; ++j) {
    // Row j with the pending reflection applied.
    const bool pending = j > 0;
    const T shift = T(0.5) * tau * tau * product_v;
    const T w_j = pending ? tau * product[j] - shift : T(0);
    T squares = 0;
    for (int i = j + team.rank(); i < n; i += team.size()) {
      const T v = !pending ? T(0) : i == j ? T(1) : rows[i].next * factor;
      const T w = !pending ? T(0) : tau * product[i] - shift * v;
      const T next = matrix[j * stride + i] - (w + w_j * v);
      if (i == j) tridiagonal[j] = next;
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
    if (team.rank() == 0) tridiagonal[stride + j] = beta;

    // The pending update and the new product in one pass over rows and columns from j + 1 on. A block has
    // columns of its own, and its members parts of their rows.
    const int begin = (j + 1) / WIDE * WIDE;
    const int share = ((stride - begin) / WIDE + team.blocks() - 1) / team.blocks();
    const int left = begin + team.block_number() * share * WIDE;
    const int columns = left >= stride ? 0 : left + share * WIDE <= stride ? share : (stride - left) / WIDE;
    int depth = block.size() / share;
    if (depth > (n - j) / AHEAD) depth = (n - j) / AHEAD;
    if (depth < 1) depth = 1;
    for (int turn = block.rank(); turn < depth * columns; turn += block.size()) {
      const int part = turn / columns;
      const int column = left + (turn - part * columns) * WIDE;
      Wide v, w, sum;
      for (int c = 0; c < WIDE; ++c) {
        // Columns that the reduction has passed, or that only fill up the row, stay out of it.
        const bool live = column + c > j && column + c < n;
        v.value[c] = live ? rows[column + c].v : T(0);
        w.value[c] = live ? rows[column + c].w : T(0);
        sum.value[c] = 0;
      }
      T* const at = matrix + column;
      for (int row = j + 1 + part; row < n; row += AHEAD * depth) {
        Wide a[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          if (row + k * depth < n) a[k].load(at + (row + k * depth) * stride, true);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          const int r = row + k * depth;
          if (r >= n) continue;
          const Reflected<T> here = rows[r];
          const T scale = r == j + 1 ? T(1) : here.next * factor;
#pragma unroll
          for (int c = 0; c < WIDE; ++c) {
            a[k].value[c] -= here.v * w.value[c] + here.w * v.value[c];
            sum.value[c] += a[k].value[c] * scale;
          }
          a[k].store(at + r * stride, true);
        }
      }
      sum.store(parts + turn * WIDE, true);
    }
    block.barrier();
    product_v = 0;
    for (int c = block.rank(); c < columns * WIDE; c += block.size()) {
      const int i = left + c;
      if (i <= j || i >= n) continue;
      T y = 0;
      for (int part = 0; part < depth; ++part) y += parts[part * columns * WIDE + c];
      product[i] = y;
      product_v += y * (i == j + 1 ? T(1) : rows[i].next * factor);
    }
    product_v = team.sum(product_v);
  }
}

}  // namespace rmsgd
