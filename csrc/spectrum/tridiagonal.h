// Reduction of a symmetric matrix to tridiagonal form by a team, keeping its eigenvalues.
//
// Householder reflections H = 1 - tau v v^T, one per row. Applying one to both sides is
// A <- A - v w^T - w v^T with p = tau A v and w = p - (tau / 2)(p . v) v. Row j + 1 of the result is all that
// the next reflection needs, so the update is put off and joined with the product A v of the next
// reflection: the rest of the matrix is read and written once per row.
//
// Blocks have columns of their own (slabs.h). The last rows of these are in the registers of the block's
// threads, as many as there is room for, and the others in shared memory where they fit. All that blocks
// exchange is two numbers per row of the matrix: its product and its element of the next row. The vectors v
// and w every block forms for itself, by the same sums in the same order, so that the blocks wait for each
// other once per row: where p . v is summed. Within a block its threads meet four times per row.
//
// Counted: n^3 / 3 elements are met, three multiply-adds for every one of them, and 2 sizeof(T) bytes of
// traffic for those in memory. What a row waits for and what the traffic takes on a card is in
// rmsgd/backends/cuda_devices.py; `python -m bench gpu --model` prints what comes of it.
#pragma once

#include "../element.h"
#include "slabs.h"

namespace rmsgd {

// What a block knows of row i during a reflection: v and w of the reflection that is still to be applied, and
// the row from which the next one is made, without its first element, which is no part of the sum that
// `factor` multiplies. Three elements, so that threads that work on neighbouring rows do not wait for one
// bank.
template <class T>
struct Reflected {
  T v, w, below;
};

// What the block that has column i tells the others.
template <class T>
struct alignas(2 * sizeof(T)) Exchanged {
  T product, next;
};

// Elements of T that the team exchanges.
RMSGD_FN int exchanged_elements(int stride) { return 4 * stride; }

// How many rows of a pack a member has registers for.
template <class T>
RMSGD_FN constexpr int kept_by_member() {
  return sizeof(T) == 4 ? 19 : 0;
}

// Which rows of its columns a block keeps in the registers of its members: the last ones, which take part the
// longest. The others are in memory.
struct KeptRows {
  int first;  // the rows before it are in memory
  int each;   // rows of a member, `depth` rows apart
  int depth;  // members of a pack of columns

  RMSGD_FN int parts() const { return (depth + 1) | 1; }
};

// packs: of the widest slab.
template <class T>
RMSGD_FN KeptRows kept_rows(int n, int packs, int members) {
  int depth = members / packs;
  if (kept_by_member<T>() == 0 || depth == 0) return {n, 0, 1};
  int each = (n + depth - 1) / depth;
  if (each > kept_by_member<T>()) each = kept_by_member<T>();
  if (depth > n / each) depth = n / each;
  return {n - each * depth, each, depth};
}

// Elements of T that every block needs for itself: of its rows, for the parts of its sums over rows in
// memory, and for those over rows in registers. Of the latter each pack has `depth` parts and a place for the
// next row, an odd number, so that threads that work on different packs do not wait for one bank.
RMSGD_FN int reflected_elements(int stride) { return 4 * stride; }
RMSGD_FN int memory_part_elements(const KeptRows& kept, int packs, int members) {
  return kept.first == 0 ? 0 : (members > packs ? members : packs) * SLAB_PACK;
}
RMSGD_FN int part_elements(const KeptRows& kept, int packs, int members) {
  return memory_part_elements(kept, packs, members) + (kept.each == 0 ? 0 : packs * kept.parts() * SLAB_PACK);
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

// The pending update of a row of a pack, and its part of the columns' new products.
template <class T>
RMSGD_FN void pass(Pack<T, SLAB_PACK>& a, const Pack<T, SLAB_PACK>& v, const Pack<T, SLAB_PACK>& w,
                   const Reflected<T>& row, Pack<T, SLAB_PACK>& sum) {
#pragma unroll
  for (int c = 0; c < SLAB_PACK; ++c) {
    a.value[c] -= row.v * w.value[c];
    a.value[c] -= row.w * v.value[c];
    sum.value[c] += a.value[c] * row.below;
  }
}

// A block's columns, and where those of their rows go that are in memory. Both are 16-byte aligned, and may
// be the same place.
template <class T>
struct Slab {
  const T* from;  // one row after the other
  T scale;        // what to multiply them by, so that the matrix's norm is about 1
  T* to;
  int stride;  // of the rows there, a multiple of SLAB_PACK
};

// exchanged: exchanged_elements(stride), of the team. rows, parts: reflected_elements(stride) and
// part_elements(the widest slab's packs, members of a block), of the block. All 16-byte aligned. An int
// counts all elements, for want of registers. What the block's other members wrote before the call is
// visible; the result is after the team's next barrier.
template <class T, class Team>
RMSGD_FN void tridiagonalise(Team& team, const Slabs& slabs, const Slab<T>& slab, T* exchanged, T* rows,
                             T* parts, const Tridiagonal<T>& result) {
  constexpr int AHEAD = 3;  // rows loaded before the first is used
  constexpr int KEPT = kept_by_member<T>();
  typedef Pack<T, SLAB_PACK> Wide;
  // Squares below this are lost beside a matrix of norm 1.
  const T negligible = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
  const int n = slabs.n, stride = slabs.packs * SLAB_PACK, mine = team.block_number();
  const int packs = slabs.packs_of(mine), width = packs * SLAB_PACK;
  Reflected<T>* const reflected = reinterpret_cast<Reflected<T>*>(rows);
  T* const next_row = rows + 3 * stride;
  auto& block = team.block();

  for (int c = block.rank(); c < width; c += block.size()) {
    const int i = slabs.column(mine, c);
    if (i < n) reinterpret_cast<Exchanged<T>*>(exchanged)[i] = {T(0), slab.from[c] * slab.scale};
  }
  // Columns that only fill up a pack take part in it, for nothing.
  for (int i = n + block.rank(); i < stride; i += block.size()) reflected[i] = {T(0), T(0), T(0)};
  block.barrier();
  const KeptRows in_registers = kept_rows<T>(n, slabs.packs_of(0), block.size());
  const int in_memory = in_registers.first;
  for (int turn = block.rank(); turn < in_memory * packs; turn += block.size()) {
    const int row = turn / packs, pack = turn - row * packs;
    Wide elements;
    elements.load(slab.from + row * width + pack * SLAB_PACK, true);
    for (T& element : elements.value) element *= slab.scale;
    elements.store(slab.to + row * slab.stride + pack * SLAB_PACK, true);
  }
  // This member's rows in registers, the last one first.
  Wide kept[KEPT > 0 ? KEPT : 1];
  const int depth_kept = in_registers.depth;
  const int pack_kept = block.rank() / depth_kept;
  const int row_kept = n - depth_kept + block.rank() - pack_kept * depth_kept;
  int steps = in_registers.each;  // that are left
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    if (pack_kept < packs && k < steps)
      kept[k].load(slab.from + (row_kept - k * depth_kept) * width + pack_kept * SLAB_PACK, true);
  }
#pragma unroll
  for (int k = 0; k < KEPT; ++k) {
    for (T& element : kept[k].value) element = pack_kept < packs && k < steps ? element * slab.scale : T(0);
  }
  T* const parts_kept = parts + memory_part_elements(in_registers, slabs.packs_of(0), block.size());
  // The pending reflection: v_i is 1 at its first row and next_row[i] * factor below.
  T tau = 0, factor = 0, product_v = team.sum(T(0));
  for (int j = 0; j < n; ++j) {
    // Row j with the pending reflection applied.
    const bool pending = j > 0;
    // Two in turn: a block that is ahead writes the next row's while another still reads this one's.
    const Exchanged<T>* const known = reinterpret_cast<Exchanged<T>*>(exchanged) + j % 2 * stride;
    const T shift = T(0.5) * tau * tau * product_v;
    const T w_j = tau * known[j].product - shift;
    T squares = 0;
    for (int i = j + block.rank(); i < n; i += block.size()) {
      const Exchanged<T> at = known[i];
      const T v = !pending ? T(0) : i == j ? T(1) : next_row[i] * factor;
      const T w = tau * at.product - shift * v;
      const T next = at.next - (w + w_j * v);
      const T below = i >= j + 2 ? next : T(0);
      if (i == j && mine == 0) result.diagonal[j] = next;
      squares += below * below;
      reflected[i] = {v, w, below};
      next_row[i] = next;
    }
    // Rows that the reduction has passed count as zeros.
    if (pending && block.rank() == 0) reflected[j - 1] = {T(0), T(0), T(0)};
    squares = block.sum(squares);
    if (j + 1 == n) break;

    // The reflection that turns (next_{j+1}, ...) into (beta, 0, ...).
    const T alpha = next_row[j + 1];
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
    // columns and parts of the rows: of those in memory as many as there are for each pack that is left,
    const int passed = slabs.packs_of(mine, (j + 1) / SLAB_PACK);
    const int live = packs - passed;
    int depth = live > 0 ? block.size() / live : 1;
    if (depth > (in_memory - j) / AHEAD) depth = (in_memory - j) / AHEAD;
    if (depth < 1) depth = 1;
    if (j + 1 >= in_memory) depth = 0;
    for (int turn = block.rank(); turn < depth * live; turn += block.size()) {
      const int part = turn / live;
      const int pack = passed + turn - part * live;
      const Reflected<T>* const columns = reflected + slabs.column(mine, pack * SLAB_PACK);
      Wide v, w, sum;
      for (int c = 0; c < SLAB_PACK; ++c) {
        v.value[c] = columns[c].v;
        w.value[c] = columns[c].w;
        sum.value[c] = 0;
      }
      const int step = depth * slab.stride;
      T* at = slab.to + pack * SLAB_PACK + (j + 1 + part) * slab.stride;
      const Reflected<T>* here = reflected + (j + 1 + part);
      for (int left = in_memory - (j + 1 + part); left > 0; left -= AHEAD * depth) {
        Wide a[AHEAD];
        T* from = at;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          if (k * depth < left) a[k].load(from, true);
          from += step;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
          if (k * depth < left) {
            pass(a[k], v, w, *here, sum);
            a[k].store(at, true);
          }
          at += step;
          here += depth;
        }
      }
      sum.store(parts + turn * SLAB_PACK, true);
    }
    // and of those in registers what they have. Row j + 1 is the last one there that is left.
    if (n - depth_kept * (steps - 1) <= j + 1) --steps;
    if (KEPT > 0 && steps > 0 && pack_kept >= passed && pack_kept < packs) {
      const Reflected<T>* const columns = reflected + slabs.column(mine, pack_kept * SLAB_PACK);
      int row = row_kept;
      T* const part = parts_kept + pack_kept * in_registers.parts() * SLAB_PACK;
      Wide v, w, sum;
      for (int c = 0; c < SLAB_PACK; ++c) {
        v.value[c] = columns[c].v;
        w.value[c] = columns[c].w;
        sum.value[c] = 0;
      }
#pragma unroll
      for (int k = 0; k < KEPT; ++k) {
        if (k >= steps) continue;
        pass(kept[k], v, w, reflected[row], sum);
        if (k + 1 == steps && row == j + 1) kept[k].store(part + depth_kept * SLAB_PACK, true);
        row -= depth_kept;
      }
      sum.store(part + (row_kept - n + depth_kept) * SLAB_PACK, true);
    }
    block.barrier();
    product_v = 0;
    for (int c = block.rank(); c < live * SLAB_PACK; c += block.size()) {
      const int index = passed * SLAB_PACK + c;
      const int i = slabs.column(mine, index);
      if (i <= j || i >= n) continue;
      T below = 0;
      for (int part = 0; part < depth; ++part) below += parts[part * live * SLAB_PACK + c];
      const T* const in_pack =
          parts_kept + index / SLAB_PACK * in_registers.parts() * SLAB_PACK + index % SLAB_PACK;
      if (in_registers.each > 0) {
        for (int part = 0; part < depth_kept; ++part) below += in_pack[part * SLAB_PACK];
      }
      const T next = depth > 0 ? slab.to[(j + 1) * slab.stride + index] : in_pack[depth_kept * SLAB_PACK];
      const T product = below * factor + next;
      (reinterpret_cast<Exchanged<T>*>(exchanged) + (j + 1) % 2 * stride)[i] = {product, next};
      product_v += product * (i == j + 1 ? T(1) : next_row[i] * factor);
    }
    product_v = team.sum(product_v);
  }
}

}  // namespace rmsgd
