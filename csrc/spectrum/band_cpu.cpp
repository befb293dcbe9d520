#include "band_cpu.h"

#include "reflector_cpu.h"
#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

// The rest of the matrix is worked through in blocks of so many rows and columns, which stay in the
// second-level cache. Two blocks of rows are as high as one of columns is wide.
constexpr ptrdiff_t BLOCK_ROWS = 2 * BAND, BLOCK_COLUMNS = 4 * BAND;

constexpr ptrdiff_t PAIR = 2 * BAND;  // elements of a row of [V W]

RMSGD_FN ptrdiff_t lesser(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
RMSGD_FN ptrdiff_t greater(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
RMSGD_FN ptrdiff_t rounded_up(ptrdiff_t n, ptrdiff_t to) { return (n + to - 1) / to * to; }

// Shorter chains than in a Gram matrix: a panel's errors do not average out over as many sums, and where many
// eigenvalues are equal to the largest they add up. Chains of 64 make the errors up to half as large again.
template <class T, int VECTORS>
using BandTile = Tile<T, VECTORS, 16>;

// A number of vectors that the compiler knows.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls work(column, Count) for the tiles that cover columns [left, right), which are whole vectors.
template <class T, class Work>
RMSGD_FN void for_tiles(ptrdiff_t left, ptrdiff_t right, const Work& work) {
  constexpr ptrdiff_t W = LANES<T>;
  for (; left + 3 * W <= right; left += 3 * W) work(left, Count<3>());
  if (left + 2 * W <= right) {
    work(left, Count<2>());
  } else if (left < right) {
    work(left, Count<1>());
  }
}

// to += sign * tile.
template <int SIGN, class T, int VECTORS>
RMSGD_FN void add_tile(T* to, ptrdiff_t stride, const BandTile<T, VECTORS>& tile) {
  constexpr int W = LANES<T>;
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      T* const at = to + r * stride + v * W;
      store(at, SIGN < 0 ? load(at) - tile.sum[r][v] : load(at) + tile.sum[r][v]);
    }
  }
}

// The reflections of a panel, Q = 1 - V T V^T, and the W of its update, in two layouts: a row of V and one of
// W side by side, and their columns in memory as rows. Each operand of a tile is in one of them.
template <class T>
struct Panel {
  T* rows;     // (n, 2 BAND): [V W]
  T* columns;  // (2 BAND, stride): [W V]^T
};

template <class T>
struct Reduction {
  T* matrix;
  ptrdiff_t stride;
  ptrdiff_t bottom;  // rows that are worked on, a multiple of TILE_ROWS
  ptrdiff_t end;     // columns that are worked on, whole vectors
  Panel<T> before;   // the panel whose update is pending
  Panel<T> now;
  T* row_parts;     // BAND_PARTS times (n, BAND): parts of Y
  T* column_parts;  // BAND_PARTS times (BAND, stride): parts of Y^T
  ptrdiff_t row_part_size, column_part_size;

  RMSGD_FN T* at(ptrdiff_t i, ptrdiff_t j) const { return matrix + i * stride + j; }

  // A -= V W^T + W V^T of the panel before, in rows [top, below) and columns [left, right).
  void subtract_pending(ptrdiff_t top, ptrdiff_t below, ptrdiff_t left, ptrdiff_t right) const {
    for_tiles<T>(left, right, [&](ptrdiff_t column, auto count) {
      constexpr int V = decltype(count)::value;
      for (ptrdiff_t row = top; row < below; row += TILE_ROWS) {
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int v = 0; v < V; ++v) __builtin_prefetch(at(row + r, column + v * LANES<T>), 1);
        }
        const BandTile<T, V> tile(before.rows + row * PAIR, 1, before.columns + column, stride, LANES<T>,
                                  PAIR, PAIR);
        add_tile<-1>(at(row, column), stride, tile);
      }
    });
  }

  // What these elements contribute to Y^T = V^T A.
  void multiply_columns(ptrdiff_t top, ptrdiff_t below, ptrdiff_t left, ptrdiff_t right, T* part) const {
    for_tiles<T>(left, right, [&](ptrdiff_t column, auto count) {
      constexpr int V = decltype(count)::value;
      for (ptrdiff_t k = 0; k < BAND; k += TILE_ROWS) {
        const BandTile<T, V> tile(now.rows + top * PAIR + k, PAIR, at(top, column), stride, LANES<T>,
                                  below - top);
        add_tile<1>(part + k * stride + column, stride, tile);
      }
    });
  }

  // What these elements contribute to Y = A V.
  void multiply_rows(ptrdiff_t top, ptrdiff_t below, ptrdiff_t left, ptrdiff_t right, T* part) const {
    for (ptrdiff_t row = top; row < below; row += TILE_ROWS) {
      for_tiles<T>(0, BAND, [&](ptrdiff_t k, auto count) {
        constexpr int V = decltype(count)::value;
        const BandTile<T, V> tile(at(row, left), 1, now.rows + left * PAIR + k, PAIR, LANES<T>, right - left,
                                  stride);
        add_tile<1>(part + row * BAND + k, BAND, tile);
      });
    }
  }

  // The part of the rest, rows and columns from `start` on, that has this number: the pending update, and the
  // products with V while the elements are in the cache.
  void pass(ptrdiff_t start, int number, bool pending) const {
    const int low = number % BAND_PARTS, p = number / BAND_PARTS;
    const int q = (low + BAND_PARTS - p) % BAND_PARTS;
    T* const row_part = row_parts + q * row_part_size;
    T* const column_part = column_parts + p * column_part_size;
    for (ptrdiff_t block = start / BLOCK_COLUMNS; block * BLOCK_COLUMNS < end; ++block) {
      if (block % BAND_PARTS != q) continue;
      const ptrdiff_t left = greater(start, block * BLOCK_COLUMNS);
      const ptrdiff_t right = lesser(end, (block + 1) * BLOCK_COLUMNS);
      for (ptrdiff_t k = 0; k < BAND; ++k) {
        for (ptrdiff_t j = left; j < right; ++j) column_part[k * stride + j] = T(0);
      }
    }
    for (ptrdiff_t block = start / BLOCK_ROWS; block * BLOCK_ROWS < bottom; ++block) {
      if (block % BAND_PARTS != p) continue;
      const ptrdiff_t top = greater(start, block * BLOCK_ROWS);
      const ptrdiff_t below = lesser(bottom, (block + 1) * BLOCK_ROWS);
      for (ptrdiff_t i = top * BAND; i < below * BAND; ++i) row_part[i] = T(0);
      for (ptrdiff_t column = top / BLOCK_COLUMNS; column * BLOCK_COLUMNS < end; ++column) {
        if (column % BAND_PARTS != q) continue;
        const ptrdiff_t right = lesser(end, (column + 1) * BLOCK_COLUMNS);
        ptrdiff_t left = column * BLOCK_COLUMNS;
        if (left < below) {
          pass_diagonal(top, below, pending, row_part, column_part);
          left = vectors_up<T>(below);
        }
        if (left < right) pass_block(top, below, left, right, pending, row_part, column_part);
      }
    }
  }

  void pass_block(ptrdiff_t top, ptrdiff_t below, ptrdiff_t left, ptrdiff_t right, bool pending, T* row_part,
                  T* column_part) const {
    if (pending) subtract_pending(top, below, left, right);
    multiply_columns(top, below, left, right, column_part);
    multiply_rows(top, below, left, right, row_part);
  }

  // Blocks of BAND elements on the diagonal are kept whole, so that they need one product only.
  void pass_diagonal(ptrdiff_t top, ptrdiff_t below, bool pending, T* row_part, T* column_part) const {
    for (ptrdiff_t first = top; first < below; first += BAND) {
      const ptrdiff_t last = lesser(first + BAND, below);
      if (pending) subtract_pending(first, last, first, vectors_up<T>(last));
      multiply_rows(first, last, first, vectors_up<T>(last), row_part);
      if (last < below) pass_block(first, last, last, vectors_up<T>(below), pending, row_part, column_part);
    }
  }

  // Y = A V from its parts, into the first one, for the rows of each thread.
  void add_parts(ptrdiff_t start, const ThreadTeam& team) const {
    constexpr ptrdiff_t COUNT = 16;
    T sums[BAND][COUNT] __attribute__((aligned(64)));
    for (ptrdiff_t first = start + team.rank() * COUNT; first < end; first += team.size() * COUNT) {
      const ptrdiff_t columns = lesser(COUNT, end - first);
      for (ptrdiff_t k = 0; k < BAND; ++k) {
        for (ptrdiff_t j = 0; j < columns; j += LANES<T>) {
          const T* const from = column_parts + k * stride + first + j;
          Vector<T> sum = load(from);
          for (int p = 1; p < BAND_PARTS; ++p) sum += load(from + p * column_part_size);
          store(&sums[k][j], sum);
        }
      }
      for (ptrdiff_t i = 0; i < COUNT && first + i < bottom; ++i) {
        T* const row = row_parts + (first + i) * BAND;
        for (ptrdiff_t k = 0; k < BAND; ++k) {
          T sum = row[k];
          for (int q = 1; q < BAND_PARTS; ++q) sum += row[q * row_part_size + k];
          row[k] = sum + sums[k][i];
        }
      }
    }
  }

  // out = V^T right for `right` (n, BAND), rows `step` apart, by the team.
  void multiply_by_v(const T* right, ptrdiff_t step, ptrdiff_t start, T* out, const ThreadTeam& team) const {
    for (ptrdiff_t k = team.rank() * TILE_ROWS; k < BAND; k += team.size() * TILE_ROWS) {
      for_tiles<T>(0, BAND, [&](ptrdiff_t l, auto count) {
        constexpr int V = decltype(count)::value;
        const BandTile<T, V> tile(now.rows + start * PAIR + k, PAIR, right + start * step + l, step, LANES<T>,
                                  bottom - start);
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int v = 0; v < V; ++v) store(out + (k + r) * BAND + l + v * LANES<T>, tile.sum[r][v]);
        }
      });
    }
  }
};

// Rows x_k -= tau (x_k . v) v, `count` of them, at most four.
template <class T>
void reflect_rows(T* rows, ptrdiff_t stride, int count, const T* v, double tau, ptrdiff_t first,
                  ptrdiff_t end) {
  constexpr int W = LANES<T>;
  T dots[4], factor[4];
  dot_rows(rows, stride, count, v, first, end, dots);
  for (int r = 0; r < count; ++r) factor[r] = T(tau * double(dots[r]));
  if (count == 4) {
    for (ptrdiff_t j = first; j < end; j += W) {
      const Vector<T> right = load(v + j);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        store(rows + r * stride + j, load(rows + r * stride + j) - factor[r] * right);
      }
    }
    return;
  }
  for (int r = 0; r < count; ++r) {
    T* const x = rows + r * stride;
    for (ptrdiff_t j = first; j < end; j += W) store(x + j, load(x + j) - factor[r] * load(v + j));
  }
}

// Makes rows [start, start + BAND) zero beyond the band. The reflection of row start + c, of elements from
// column start + BAND + c on, is left in v_rows[c] and tau[c].
template <class T>
void reflect_panel(const Reduction<T>& A, int n, ptrdiff_t start, T* v_rows, double* tau,
                   const ThreadTeam& team) {
  const ptrdiff_t first = start + BAND;
  const auto make = [&](int c) {
    const ptrdiff_t at = first + c;
    T* const v = v_rows + c * A.stride;
    T* const row = A.at(start + c, 0);
    tau[c] = 0.0;
    if (at + 1 < n) {
      for (ptrdiff_t j = first; j < A.end; ++j) v[j] = j < at ? T(0) : row[j];
      double beta;
      tau[c] = reflect(v, at, A.end, &beta);
      row[at] = T(beta);
    }
    if (tau[c] == 0.0) {
      for (ptrdiff_t j = first; j < A.end; ++j) v[j] = T(0);
    }
  };
  if (team.rank() == 0) make(0);
  for (int c = 0; c < BAND; ++c) {
    team.barrier();
    for (int row = c + 1, turn = 0; row < BAND; row += 4, ++turn) {
      if (turn % team.size() != team.rank()) continue;
      if (tau[c] != 0.0) {
        reflect_rows(A.at(start + row, 0), A.stride, BAND - row < 4 ? BAND - row : 4, v_rows + c * A.stride,
                     tau[c], vectors_down<T>(first + c), A.end);
      }
      if (turn == 0) make(c + 1);
    }
  }
  team.barrier();
}

// T of Q = 1 - V T V^T, upper triangular, from G = V^T V: its inverse is that triangle of G with 1 / tau on
// the diagonal.
template <class T>
void triangle_of(const T* G, const double* tau, double (&triangle)[BAND][BAND]) {
  for (int j = 0; j < BAND; ++j) {
    for (int i = 0; i < BAND; ++i) triangle[i][j] = 0.0;
    for (int k = 0; k < j; ++k) {
      const double factor = tau[j] * double(G[k * BAND + j]);
      for (int i = 0; i <= k; ++i) triangle[i][j] -= triangle[i][k] * factor;
    }
    triangle[j][j] = tau[j];
  }
}

// S = T^T Z T with Z = V^T A V.
template <class T>
void inner_of(const T* Z, const double (&triangle)[BAND][BAND], double (&S)[BAND][BAND]) {
  double right[BAND][BAND];
  for (int i = 0; i < BAND; ++i) {
    for (int j = 0; j < BAND; ++j) right[i][j] = 0.0;
    for (int k = 0; k < BAND; ++k) {
      const double z = double(Z[i * BAND + k]);
      for (int j = 0; j < BAND; ++j) right[i][j] += z * triangle[k][j];
    }
  }
  for (int i = 0; i < BAND; ++i) {
    for (int j = 0; j < BAND; ++j) S[i][j] = 0.0;
  }
  for (int k = 0; k < BAND; ++k) {
    for (int i = 0; i < BAND; ++i) {
      for (int j = 0; j < BAND; ++j) S[i][j] += triangle[k][i] * right[k][j];
    }
  }
}

// The upper triangle of scale * gram in T, whole blocks on the diagonal, zero beyond n. In place or not.
template <class T>
void copy_gram(const Reduction<T>& A, const double* gram, double scale, int n, const ThreadTeam& team) {
  for (ptrdiff_t top = team.rank() * BAND; top < A.bottom; top += team.size() * BAND) {
    const ptrdiff_t below = lesser(top + BAND, A.bottom);
    for (ptrdiff_t i = top; i < below; ++i) {
      for (ptrdiff_t j = i; j < A.end; ++j)
        *A.at(i, j) = i < n && j < n ? T(scale * gram[i * A.stride + j]) : T(0);
    }
    for (ptrdiff_t i = top; i < below; ++i) {
      for (ptrdiff_t j = top; j < i; ++j) *A.at(i, j) = *A.at(j, i);
    }
  }
  team.barrier();
}

template <class T>
void copy_band(const Reduction<T>& A, int n, double* band, const ThreadTeam& team) {
  const ptrdiff_t rows = band_size(n) / (BAND_STRIDE + 1);
  for (ptrdiff_t i = team.rank(); i < rows; i += team.size()) {
    double* const row = band + i * BAND_STRIDE + i;
    // The slot of a row begins some elements before the band.
    constexpr ptrdiff_t BEFORE = BAND + 7;
    for (ptrdiff_t d = i == 0 ? 0 : -BEFORE; d < BAND_STRIDE + 1 - BEFORE; ++d) {
      const ptrdiff_t j = i + d;
      double value = 0.0;
      if (i < n && j >= 0 && j < n && d > -BAND && d <= BAND) {
        value = d >= 0 ? double(*A.at(i, j)) : double(*A.at(j, i));
      }
      row[d] = value;
    }
  }
  team.barrier();
}

// Per panel: the pending update of its rows, their reflections, then one pass through the rest in which the
// pending update is made and multiplied by the new V. With X = A V T,
//
//   Q^T A Q = A - V W^T - W V^T,  W = X - V (T^T V^T X) / 2
template <class T>
void reduce_to_band(const double* gram, double scale, int n, ptrdiff_t stride, T* matrix, T* work,
                    const ThreadTeam& team) {
  const ptrdiff_t rows = rounded_up(n, 16);
  T* next = work;
  const auto take = [&](ptrdiff_t size) {
    T* const taken = next;
    next += size;
    return taken;
  };
  Reduction<T> A;
  A.matrix = matrix;
  A.stride = stride;
  A.bottom = rounded_up(n, TILE_ROWS);
  A.end = vectors_up<T>(n);
  A.before = {take(rows * PAIR), take(stride * PAIR)};
  A.now = {take(rows * PAIR), take(stride * PAIR)};
  A.row_part_size = rows * BAND;
  A.column_part_size = stride * BAND;
  A.row_parts = take(BAND_PARTS * A.row_part_size);
  A.column_parts = take(BAND_PARTS * A.column_part_size);
  T* const G = take(BAND * BAND);
  T* const Z = take(BAND * BAND);
  T* const triangle = take(BAND * BAND);
  T* const half = take(BAND * BAND);  // -S / 2
  double* const tau = reinterpret_cast<double*>(take(2 * BAND));
  copy_gram(A, gram, scale, n, team);
  for (ptrdiff_t start = 0; start < n; start += BAND) {
    const ptrdiff_t rest = start + BAND;
    const bool pending = start > 0;
    if (pending) {
      for (ptrdiff_t left = start + team.rank() * BAND; left < A.end; left += team.size() * BAND) {
        A.subtract_pending(start, lesser(rest, A.bottom), left, lesser(left + BAND, A.end));
      }
      team.barrier();
    }
    if (rest >= n) break;
    T* const v_rows = A.now.columns + BAND * stride;
    reflect_panel(A, n, start, v_rows, tau, team);
    for (ptrdiff_t i = rest + team.rank(); i < A.end; i += team.size()) {
      for (ptrdiff_t k = 0; k < BAND; ++k) A.now.rows[i * PAIR + k] = v_rows[k * stride + i];
    }
    team.barrier();
    A.multiply_by_v(A.now.rows, PAIR, rest, G, team);
    for (int number = team.rank(); number < BAND_PARTS * BAND_PARTS; number += team.size()) {
      A.pass(rest, number, pending);
    }
    team.barrier();
    A.add_parts(rest, team);
    team.barrier();
    T* const Y = A.row_parts;
    A.multiply_by_v(Y, BAND, rest, Z, team);
    team.barrier();
    if (team.rank() == 0) {
      double exact[BAND][BAND], S[BAND][BAND];
      triangle_of(G, tau, exact);
      inner_of(Z, exact, S);
      for (int i = 0; i < BAND; ++i) {
        for (int j = 0; j < BAND; ++j) {
          triangle[i * BAND + j] = T(exact[i][j]);
          half[i * BAND + j] = T(-0.5 * S[i][j]);
        }
      }
    }
    team.barrier();
    for (ptrdiff_t row = rest + team.rank() * TILE_ROWS; row < A.bottom; row += team.size() * TILE_ROWS) {
      for_tiles<T>(0, BAND, [&](ptrdiff_t k, auto count) {
        constexpr int V = decltype(count)::value;
        T* const to = A.now.rows + row * PAIR + BAND + k;
        const BandTile<T, V> x(Y + row * BAND, 1, triangle + k, BAND, LANES<T>, BAND, BAND);
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int v = 0; v < V; ++v) store(to + r * PAIR + v * LANES<T>, x.sum[r][v]);
        }
        add_tile<1>(to, PAIR,
                    BandTile<T, V>(A.now.rows + row * PAIR, 1, half + k, BAND, LANES<T>, BAND, PAIR));
      });
      for (ptrdiff_t k = 0; k < BAND; ++k) {
        for (int r = 0; r < TILE_ROWS; ++r) {
          A.now.columns[k * stride + row + r] = A.now.rows[(row + r) * PAIR + BAND + k];
        }
      }
    }
    for (ptrdiff_t k = 0; team.rank() == 0 && k < BAND; ++k) {
      for (ptrdiff_t j = A.bottom; j < A.end; ++j) A.now.columns[k * stride + j] = T(0);
    }
    const Panel<T> old = A.before;
    A.before = A.now;
    A.now = old;
    team.barrier();
  }
  copy_band(A, n, reinterpret_cast<double*>(work), team);
}

}  // namespace

void reduce_to_band_f32(const double* gram, double scale, int n, ptrdiff_t stride, float* matrix, float* work,
                        const ThreadTeam& team) {
  reduce_to_band(gram, scale, n, stride, matrix, work, team);
}

void reduce_to_band_f64(const double* gram, double scale, int n, ptrdiff_t stride, double* matrix,
                        double* work, const ThreadTeam& team) {
  reduce_to_band(gram, scale, n, stride, matrix, work, team);
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
