// Reduction of a symmetric matrix to tridiagonal form by a team, keeping its eigenvalues.
//
// Householder reflections H = 1 - tau v v^T, one per row. Applying one to both sides is
// A <- A - v w^T - w v^T with p = tau A v and w = p - (tau / 2)(p . v) v. Row j + 1 of the result is all that
// the next reflection needs, so the update is put off and joined with the product A v of the next
// reflection: the rest of the matrix is read and written once per row.
//
// Blocks have columns of their own (slabs.h), in shared memory where a slab fits. All that they exchange is
// two numbers per row of the matrix: its product and its element of the next row. The vectors v and w every
// block forms for itself, by the same sums in the same order, so that the blocks wait for each other once per
// row: where p . v is summed. Within a block its threads meet four times per row.
//
// Counted: n^3 / 3 elements are met, of 2 sizeof(T) bytes of traffic each, three multiply-adds for
// every one of them. What a row waits for and what the traffic takes on a card is in
// rmsgd/backends/cuda_devices.py; `python -m bench gpu --model` prints what comes of it.
#pragma once

#include "../element.h"
#include "slabs.h"

namespace rmsgd {

// What a block knows of row i during a reflection: v and w of the reflection that is still to be applied,
// the row from which the next one is made, and the same again without its first element, which is no part
// of the sum that `factor` multiplies.
template <class T>
struct alignas(16) Reflected {
  T v, w, next, below;
};

// What the block that has column i tells the others.
template <class T>
struct alignas(2 * sizeof(T)) Exchanged {
  T product, next;
};

// Elements of T that the team exchanges.
RMSGD_FN int exchanged_elements(int stride) { return 4 * stride; }

// Elements of T that every block needs for itself: of its rows, and for the parts of its sums.
RMSGD_FN int reflected_elements(int stride) { return 4 * stride; }
RMSGD_FN int part_elements(int slab_width, int members) {
  return members * SLAB_PACK > slab_width ? members * SLAB_PACK : slab_width;
}

// The result: the diagonal (n), the off-diagonal (n - 1) and its squares (n - 1), `stride` apart.
template <class T>
struct Tridiagonal {
  T* diagonal;
  T* off_diagonal;
  T* squares;

  RMSGD_FN Tridiagonal(T* elements, int stride)
      : diagonal(elements), off_diagonal(elements + stride), squares(elements + 2 * stride) {}
};

// slab: this block's columns, rows `slab_stride` apart (a multiple of SLAB_PACK), 16-byte aligned; destroyed.
// The matrix's norm should be about 1. exchanged: exchanged_elements(stride), of the team. rows, parts:
// reflected_elements(stride) and part_elements(slab width, members of a block), of the block. All 16-byte
// aligned. An int counts all elements, for want of registers. What the block's other members wrote before the
// call is visible; the result is after the team's next barrier.
template <class T, class Team>
RMSGD_FN void tridiagonalise(Team& team, const Slabs& slabs, T* slab, int slab_stride, T* exchanged, T* rows,
                             T* parts, const Tridiagonal<T>& result) {
  constexpr int AHEAD = 3;  // rows loaded before the first is used
  typedef Pack<T, SLAB_PACK> Wide;
  // Squares below this are lost beside a matrix of norm 1.
  const T negligible = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
  const int n = slabs.n, stride = slabs.packs * SLAB_PACK, mine = team.block_number();
  Reflected<T>* const reflected = reinterpret_cast<Reflected<T>*>(rows);
  // Two in turn: a block that is ahead writes the next row's while another still reads this one's.
  Exchanged<T>* known = reinterpret_cast<Exchanged<T>*>(exchanged);
  Exchanged<T>* coming = known + stride;
  auto& block = team.block();

  for (int c = block.rank(); c < slabs.width(mine); c += block.size()) {
    const int i = slabs.column(mine, c);
    if (i < n) known[i] = {T(0), slab[c]};
  }
  // The pending reflection: v_i is 1 at its first row and reflected[i].next * factor below.
  T tau = 0, factor = 0, product_v = team.sum(T(0));
  for (int j = 0; j < n; ++j) {
    // Row j with the pending reflection applied.
    const bool pending = j > 0;
    const T shift = T(0.5) * tau * tau * product_v;
    const T w_j = tau * known[j].product - shift;
    T squares = 0;
    for (int i = j + block.rank(); i < n; i += block.size()) {
      const Exchanged<T> at = known[i];
      const T v = !pending ? T(0) : i == j ? T(1) : reflected[i].next * factor;
      const T w = tau * at.product - shift * v;
      const T next = at.next - (w + w_j * v);
      const T below = i >= j + 2 ? next : T(0);
      if (i == j && mine == 0) result.diagonal[j] = next;
      squares += below * below;
      reflected[i] = {v, w, next, below};
    }
    squares = block.sum(squares);
    if (j + 1 == n) break;

    // The reflection that turns (next_{j+1}, ...) into (beta, 0, ...).
    const T alpha = reflected[j + 1].next;
    T beta = alpha;
    tau = factor = 0;
    if (squares >= negligible) {
      beta = alpha > T(0) ? -sqrt(alpha * alpha + squares) : sqrt(alpha * alpha + squares);
      factor = T(1) / (alpha - beta);
      tau = (beta - alpha) / beta;
    }
    if (team.rank() == 0) {
      result.off_diagonal[j] = beta;
      result.squares[j] = beta * beta;
    }

    // The pending update and the new product in one pass over rows and columns from j + 1 on. Members have
    // columns and parts of the rows.
    const int passed = slabs.packs_of(mine, (j + 1) / SLAB_PACK);
    const int live = slabs.packs_of(mine) - passed;
    int depth = live > 0 ? block.size() / live : 1;
    if (depth > (n - j) / AHEAD) depth = (n - j) / AHEAD;
    if (depth < 1) depth = 1;
    for (int turn = block.rank(); turn < depth * live; turn += block.size()) {
      const int part = turn / live;
      const int pack = passed + turn - part * live;
      const int column = slabs.column(mine, pack * SLAB_PACK);
      Wide v, w, sum;
      for (int c = 0; c < SLAB_PACK; ++c) {
        // Columns that the reduction has passed, or that only fill up the row, stay out of it.
        const bool lives = column + c > j && column + c < n;
        v.value[c] = lives ? reflected[column + c].v : T(0);
        w.value[c] = lives ? reflected[column + c].w : T(0);
        sum.value[c] = 0;
      }
      T* const at = slab + pack * SLAB_PACK;
      for (int row = j + 1 + part; row < n; row += AHEAD * depth) {
        Wide a[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          if (row + k * depth < n) a[k].load(at + (row + k * depth) * slab_stride, true);
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          const int r = row + k * depth;
          if (r >= n) continue;
          const Reflected<T> here = reflected[r];
#pragma unroll
          for (int c = 0; c < SLAB_PACK; ++c) {
            a[k].value[c] -= here.v * w.value[c] + here.w * v.value[c];
            sum.value[c] += a[k].value[c] * here.below;
          }
          a[k].store(at + r * slab_stride, true);
        }
      }
      sum.store(parts + turn * SLAB_PACK, true);
    }
    block.barrier();
    product_v = 0;
    for (int c = block.rank(); c < live * SLAB_PACK; c += block.size()) {
      const int index = passed * SLAB_PACK + c;
      const int i = slabs.column(mine, index);
      if (i <= j || i >= n) continue;
      T below = 0;
      for (int part = 0; part < depth; ++part) below += parts[part * live * SLAB_PACK + c];
      const T next = slab[(j + 1) * slab_stride + index];
      const T product = below * factor + next;
      coming[i] = {product, next};
      product_v += product * (i == j + 1 ? T(1) : reflected[i].next * factor);
    }
    product_v = team.sum(product_v);
    Exchanged<T>* const read = known;
    known = coming;
    coming = read;
  }
}

}  // namespace rmsgd
