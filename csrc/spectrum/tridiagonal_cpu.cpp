#include "tridiagonal_cpu.h"

#include "reflector_cpu.h"
#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

// x -= sum over k of left[k] rows[k] + right[k] others[k], for four k at a time and the rest one by one.
template <class T>
void subtract_rows(T* x, const T* rows, const T* others, ptrdiff_t stride, int count, const T* left,
                   const T* right, ptrdiff_t first, ptrdiff_t end) {
  constexpr int W = LANES<T>;
  int k = 0;
  for (; k + 4 <= count; k += 4) {
    const T *row = rows + k * stride, *other = others + k * stride;
    const T *l = left + k, *r = right + k;
    for (ptrdiff_t j = first; j < end; j += W) {
      Vector<T> value = load(x + j), second = {};
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        value -= l[i] * load(row + i * stride + j);
        second += r[i] * load(other + i * stride + j);
      }
      store(x + j, value - second);
    }
  }
  for (; k < count; ++k) {
    const T *row = rows + k * stride, *other = others + k * stride;
    for (ptrdiff_t j = first; j < end; j += W) {
      store(x + j, load(x + j) - left[k] * load(row + j) - right[k] * load(other + j));
    }
  }
}

// The matrix in memory: groups of four rows, in each of which the rows take turns by vectors. Its two readers
// (A v, and the update of the rest) take four rows at a time, so each reads one stream of memory.
template <class T>
struct FourRows {
  T* data;
  ptrdiff_t stride;

  // The vector of row i that begins at column j, a multiple of the vector's length.
  RMSGD_FN T* at(ptrdiff_t i, ptrdiff_t j) const {
    return data + i / 4 * 4 * stride + j * 4 + i % 4 * LANES<T>;
  }
};

// y += A v for the block row `top` of a symmetric A of which the upper triangle is stored: each element
// right of the diagonal block serves its row and its column while it is in a register.
template <class T>
RMSGD_FN void multiply_block_row(const FourRows<T>& matrix, ptrdiff_t top, ptrdiff_t end, const T* v, T* y) {
  constexpr int W = LANES<T>;
  Vector<T> here = load(y + top), sums[W / 4];
#pragma GCC unroll 4
  for (int four = 0; four < W / 4; ++four) {
    const ptrdiff_t row = top + 4 * four;
    const T* from = matrix.at(row, top);
    const T scale[4] = {v[row], v[row + 1], v[row + 2], v[row + 3]};
    Vector<T> sum[4] = {}, block[2] = {};
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) block[r % 2] += load(from + r * W) * scale[r];
    here += block[0] + block[1];
    for (ptrdiff_t j = top + W; j < end; j += W) {
      from += 4 * W;
      const Vector<T> right = load(v + j);
      Vector<T> below = load(y + j);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        const Vector<T> a = load(from + r * W);
        sum[r] += a * right;
        below += a * scale[r];
      }
      store(y + j, below);
    }
    sums[four] = sums_by_fours<T>(sum);
  }
  store(y + top, here + join_fours<T>(sums));
}

template <int VECTORS, class T>
RMSGD_FN void subtract_tile(const FourRows<T>& matrix, ptrdiff_t row, ptrdiff_t column, const T* left,
                            const T* right, ptrdiff_t stride, int depth) {
  constexpr int W = LANES<T>;
  const Tile<T, VECTORS, CHAIN, TALL_TILE_ROWS> tile(left + row, stride, right + column, stride, W, depth);
#pragma GCC unroll 2
  for (int top = 0; top < TALL_TILE_ROWS; top += 4) {
    T* const to = matrix.at(row + top, column);
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        T* const at = to + (v * 4 + r) * W;
        store(at, load(at) - tile.sum[top + r][v]);
      }
    }
  }
}

// A -= left^T right for the rows and columns from `first` on, upper triangle by whole vectors.
// left and right are `depth` rows each, `stride` apart.
template <class T>
void subtract_products(const FourRows<T>& matrix, ptrdiff_t first, ptrdiff_t end, const T* left,
                       const T* right, ptrdiff_t stride, int depth, const ThreadTeam& team) {
  ptrdiff_t turn = 0;
  for (ptrdiff_t row = first; row < end; row += TALL_TILE_ROWS, ++turn) {
    if (turn % team.size() != team.rank()) continue;
    ptrdiff_t column = vectors_down<T>(row);
    for (; column + TILE_VECTORS * LANES<T> <= end; column += TILE_VECTORS * LANES<T>) {
      subtract_tile<TILE_VECTORS>(matrix, row, column, left, right, stride, depth);
    }
    for (; column < end; column += LANES<T>) {
      subtract_tile<1>(matrix, row, column, left, right, stride, depth);
    }
  }
}

// A reflection reads the whole rest of the matrix once (the product A v), so PANEL of them are gathered
// before the rest is updated: A <- A - V W^T - W V^T. Until then row j of the present matrix is the stored
// one less its part of the pending products, and A v likewise.
template <class T>
void tridiagonalise(const double* gram, double scale, int n, T* memory, double* diagonal,
                    double* off_diagonal, T* work, const ThreadTeam& team) {
  constexpr int W = LANES<T>;
  const ptrdiff_t stride = tridiagonal_stride(n);
  const ptrdiff_t end = vectors_up<T>(n);
  const FourRows<T> matrix = {memory, stride};
  // In place, the elements of four rows change their order: `work` keeps them meanwhile, in the room for V,
  // W, V.
  constexpr int ROOM = 3 * PANEL / 4;
  const int packers = team.size() < ROOM ? team.size() : ROOM;
  T* const four_rows = work + team.rank() * 4 * stride;
  for (ptrdiff_t top = 4 * team.rank(); team.rank() < packers && top < end; top += 4 * packers) {
    const ptrdiff_t first = vectors_down<T>(top);
    for (int r = 0; r < 4; ++r) {
      for (ptrdiff_t j = first; j < end; ++j)
        four_rows[r * stride + j] = T(scale * gram[(top + r) * stride + j]);
    }
    for (int r = 0; r < 4; ++r) {
      for (ptrdiff_t j = first; j < end; j += W)
        store(matrix.at(top + r, j), load(four_rows + r * stride + j));
    }
  }
  team.barrier();
  const int parts = product_parts(n);
  T* const v_rows = work;  // V, W and V again: [V W] and [W V] are both at hand
  T* const w_rows = v_rows + PANEL * stride;
  T* const v_again = w_rows + PANEL * stride;
  T* const row = v_again + PANEL * stride;
  double* const shared_tau = reinterpret_cast<double*>(row + stride);
  T* const partial = row + stride + 16;
  for (int start = 0; start < n; start += PANEL) {
    const int panel_end = start + PANEL < n ? start + PANEL : n;
    for (int j = start; j < panel_end; ++j) {
      const int pending = j - start;
      const ptrdiff_t first = vectors_down<T>(j + 1 < n ? j + 1 : j);
      T* const v = v_rows + pending * stride;
      T* const w = w_rows + pending * stride;
      double tau = 0.0;
      if (team.rank() == 0) {
        T from_v[PANEL], from_w[PANEL];
        for (int k = 0; k < pending; ++k) {
          from_v[k] = v_rows[k * stride + j];
          from_w[k] = w_rows[k * stride + j];
        }
        const ptrdiff_t begin = vectors_down<T>(j);
        for (ptrdiff_t i = begin; i < end; i += W) store(row + i, load(matrix.at(j, i)));
        subtract_rows(row, w_rows, v_rows, stride, pending, from_v, from_w, begin, end);
        diagonal[j] = double(row[j]);
        for (ptrdiff_t i = 0; i < end; ++i) v[i] = i > j ? row[i] : T(0);
        if (j + 1 < n) tau = reflect(v, j + 1, end, &off_diagonal[j]);
        for (ptrdiff_t i = 0; i < end; ++i) w[i] = T(0);
        *shared_tau = tau;
      }
      team.barrier();
      if (j + 1 >= n) continue;
      tau = *shared_tau;
      if (tau == 0.0) {
        // Every thread has read tau before the first writes the row again.
        team.barrier();
        continue;
      }
      for (int part = team.rank(); part < parts; part += team.size()) {
        T* const y = partial + part * stride;
        for (ptrdiff_t i = first; i < end; i += W) store(y + i, Vector<T>{});
        for (ptrdiff_t top = first + part * W; top < end; top += parts * W) {
          multiply_block_row(matrix, top, end, v, y);
        }
      }
      team.barrier();
      if (team.rank() == 0) {
        for (ptrdiff_t i = first; i < end; i += W) {
          Vector<T> sum = load(partial + i);
          for (int part = 1; part < parts; ++part) sum += load(partial + part * stride + i);
          store(w + i, sum);
        }
        T with_v[PANEL], with_w[PANEL];
        dot_rows(v_rows, stride, pending, v, first, end, with_v);
        dot_rows(w_rows, stride, pending, v, first, end, with_w);
        subtract_rows(w, v_rows, w_rows, stride, pending, with_w, with_v, first, end);
        Wide<T> products = {};
        for (ptrdiff_t i = first; i < end; i += W) products += load_wide(w + i) * load_wide(v + i);
        const double shift = 0.5 * tau * horizontal_sum_wide<T>(products);
        for (ptrdiff_t i = first; i < end; i += W) {
          store_narrow(w + i, tau * (load_wide(w + i) - shift * load_wide(v + i)));
        }
        for (ptrdiff_t i = first; i <= j; ++i) w[i] = T(0);
      }
      // The next reflection begins with a barrier before the others read what was written here.
    }
    if (panel_end == n) break;
    if (team.rank() == 0) {
      for (ptrdiff_t i = 0; i < PANEL * stride; ++i) v_again[i] = v_rows[i];
    }
    team.barrier();
    subtract_products(matrix, vectors_down<T>(panel_end), end, v_rows, w_rows, stride, 2 * PANEL, team);
    team.barrier();
  }
}

}  // namespace

void tridiagonalise_f32(const double* gram, double scale, int n, float* matrix, double* diagonal,
                        double* off_diagonal, float* work, const ThreadTeam& team) {
  if (is_banded(n, sizeof(float))) {
    reduce_to_band_f32(gram, scale, n, tridiagonal_stride(n), matrix, work, team);
    chase_bulges(reinterpret_cast<double*>(work), n, diagonal, off_diagonal, team);
    return;
  }
  tridiagonalise(gram, scale, n, matrix, diagonal, off_diagonal, work, team);
}

void tridiagonalise_f64(const double* gram, double scale, int n, double* matrix, double* diagonal,
                        double* off_diagonal, double* work, const ThreadTeam& team) {
  if (is_banded(n, sizeof(double))) {
    reduce_to_band_f64(gram, scale, n, tridiagonal_stride(n), matrix, work, team);
    chase_bulges(reinterpret_cast<double*>(work), n, diagonal, off_diagonal, team);
    return;
  }
  tridiagonalise(gram, scale, n, matrix, diagonal, off_diagonal, work, team);
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
