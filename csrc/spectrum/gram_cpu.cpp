#include "gram_cpu.h"

#include <float.h>

#include "../element.h"
#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

// ---- the columns of a matrix, as runs of one stride ----

// The dimensions of a side without those of size 1, the shortest stride innermost, neighbours that
// form one dimension joined. The order of rows and columns does not matter to eigenvalues.
Side tidied(const Side& side) {
  int64_t size[4], stride[4];
  int count = 0;
  for (int d = 0; d < 4; ++d) {
    if (side.size[d] == 1) continue;
    int at = count++;
    // A stride of 0 (an expanded dimension) goes outermost.
    for (; at > 0 && side.stride[d] != 0 && (stride[at - 1] == 0 || stride[at - 1] > side.stride[d]); --at) {
      size[at] = size[at - 1];
      stride[at] = stride[at - 1];
    }
    size[at] = side.size[d];
    stride[at] = side.stride[d];
  }
  int joined = 0;
  for (int d = 0; d < count; ++d) {
    if (joined > 0 && stride[d] != 0 && stride[d] == stride[joined - 1] * size[joined - 1]) {
      size[joined - 1] *= size[d];
    } else {
      size[joined] = size[d];
      stride[joined] = stride[d];
      ++joined;
    }
  }
  Side tidy;
  for (int d = 0; d < 4; ++d) {
    tidy.size[d] = 1;
    tidy.stride[d] = 0;
  }
  for (int d = 0; d < joined; ++d) {
    tidy.size[3 - d] = size[d];
    tidy.stride[3 - d] = stride[d];
  }
  return tidy;
}

RMSGD_FN int64_t offset_of(const Side& side, int64_t index) {
  int64_t offset = 0;
  for (int d = 3; d >= 0; --d) {
    offset += index % side.size[d] * side.stride[d];
    index /= side.size[d];
  }
  return offset;
}

// ---- packing ----

// Where the rows to pack lie next to each other, or the columns do, whole vectors are moved; in the second
// case blocks of B x B elements are transposed in registers.
template <class T>
constexpr int B = sizeof(T) == 8 || LANES<T> == 4 ? 4 : 8;

template <class T>
struct Block {
  typedef T vector __attribute__((vector_size(B<T> * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(B<T> * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T, class Source>
RMSGD_FN typename Block<T>::vector load_block(const Source* from, T scale) {
  typename Block<T>::vector x;
  if constexpr (is_narrow<Source>()) {
#pragma GCC unroll 8
    for (int i = 0; i < B<T>; ++i) x[i] = T(widen(from[i]));
  } else {
    typedef Source Few
        __attribute__((vector_size(B<T> * sizeof(Source)), aligned(sizeof(Source)), may_alias));
    x = __builtin_convertvector(*reinterpret_cast<const Few*>(from), typename Block<T>::vector);
  }
  return x * scale;
}

template <class T>
RMSGD_FN void store_block(T* to, typename Block<T>::vector x) {
  *reinterpret_cast<typename Block<T>::unaligned*>(to) = x;
}

// Transposition by exchanging the off-diagonal quarters of ever smaller blocks.
template <class V>
RMSGD_FN void transpose(V (&x)[4]) {
  const V a = pick<0, 1, 4, 5>(x[0], x[2]), b = pick<0, 1, 4, 5>(x[1], x[3]);
  const V c = pick<2, 3, 6, 7>(x[0], x[2]), d = pick<2, 3, 6, 7>(x[1], x[3]);
  x[0] = pick<0, 4, 2, 6>(a, b);
  x[1] = pick<1, 5, 3, 7>(a, b);
  x[2] = pick<0, 4, 2, 6>(c, d);
  x[3] = pick<1, 5, 3, 7>(c, d);
}

template <class V>
RMSGD_FN void transpose(V (&x)[8]) {
  V y[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = pick<0, 1, 2, 3, 8, 9, 10, 11>(x[i], x[i + 4]);
    y[i + 4] = pick<4, 5, 6, 7, 12, 13, 14, 15>(x[i], x[i + 4]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const V a = pick<0, 1, 8, 9, 4, 5, 12, 13>(y[i], y[i + 2]),
            b = pick<0, 1, 8, 9, 4, 5, 12, 13>(y[i + 1], y[i + 3]);
    const V c = pick<2, 3, 10, 11, 6, 7, 14, 15>(y[i], y[i + 2]),
            d = pick<2, 3, 10, 11, 6, 7, 14, 15>(y[i + 1], y[i + 3]);
    x[i] = pick<0, 8, 2, 10, 4, 12, 6, 14>(a, b);
    x[i + 1] = pick<1, 9, 3, 11, 5, 13, 7, 15>(a, b);
    x[i + 2] = pick<0, 8, 2, 10, 4, 12, 6, 14>(c, d);
    x[i + 3] = pick<1, 9, 3, 11, 5, 13, 7, 15>(c, d);
  }
}

// Where the packed columns go, as they come: one after the other, or in turn to matrices of which each has
// its own place, `apart` elements from the one before.
template <class T>
class PackedColumns {
 public:
  RMSGD_FN PackedColumns(T* first, int matrices, ptrdiff_t apart)
      : column_(first), apart_(apart), matrices_(matrices) {}

  RMSGD_FN T* operator*() const { return column_; }

  RMSGD_FN void operator++() {
    column_ += apart_;
    if (++turn_ < matrices_) return;
    turn_ = 0;
    column_ += LANES<T> - matrices_ * apart_;
  }

 private:
  T* column_;
  ptrdiff_t apart_;
  int matrices_, turn_ = 0;
};

// Writes W rows of `length` columns of one stride, column after column.
template <class T, class Source>
RMSGD_FN void pack_run(PackedColumns<T>& to, const Source* from, const int64_t* rows, int64_t stride,
                       int64_t length, T scale) {
  constexpr int W = LANES<T>;
  bool neighbours = true;
  for (int r = 1; r < W; ++r) neighbours = neighbours && rows[r] == rows[0] + r;
  int64_t k = 0;
  if (neighbours) {
    for (; k < length; ++k, ++to) {
      for (int r = 0; r < W; r += B<T>) {
        store_block(*to + r, load_block(from + rows[0] + r + k * stride, scale));
      }
    }
  } else if (stride == 1) {
    for (; k + B<T> <= length; k += B<T>) {
      PackedColumns<T> column = to;
      for (int top = 0; top < W; top += B<T>) {
        typename Block<T>::vector x[B<T>];
#pragma GCC unroll 8
        for (int r = 0; r < B<T>; ++r) x[r] = load_block(from + rows[top + r] + k, scale);
        transpose(x);
        column = to;
#pragma GCC unroll 8
        for (int r = 0; r < B<T>; ++r, ++column) store_block(*column + top, x[r]);
      }
      to = column;
    }
  }
  for (; k < length; ++k, ++to) {
    for (int r = 0; r < W; ++r) (*to)[r] = T(widen(from[rows[r] + k * stride])) * scale;
  }
}

// Packs columns [first, first + depth) of the W rows from `row` on; rows beyond the last are zero.
template <class T, class Source>
void pack_group(PackedColumns<T> to, const Source* data, const Side& small, const Side& large, int64_t row,
                int64_t first, int64_t depth, T scale) {
  constexpr int W = LANES<T>;
  const int64_t count = small.length() - row;
  int64_t rows[W];
  for (int r = 0; r < W; ++r) rows[r] = offset_of(small, r < count ? row + r : row);
  const int64_t run = large.size[3], stride = large.stride[3];
  int64_t within = first % run;
  int64_t index[3] = {first / run / large.size[2] / large.size[1],
                      first / run / large.size[2] % large.size[1], first / run % large.size[2]};
  PackedColumns<T> column = to;
  for (int64_t done = 0; done < depth; within = 0) {
    const int64_t length = run - within < depth - done ? run - within : depth - done;
    const int64_t offset =
        index[0] * large.stride[0] + index[1] * large.stride[1] + index[2] * large.stride[2];
    pack_run(column, data + offset + within * stride, rows, stride, length, scale);
    done += length;
    for (int d = 2; d >= 0 && ++index[d] == large.size[d]; --d) index[d] = 0;
  }
  if (count >= W) return;
  for (int64_t k = 0; k < depth; ++k, ++to) {
    for (int64_t r = count; r < W; ++r) (*to)[r] = T(0);
  }
}

template <class T>
void pack(const PackedColumns<T>& to, const MatrixView& matrix, const Side& small, const Side& large,
          int64_t row, int64_t first, int64_t depth, T scale) {
  with_elements(matrix.dtype, matrix.data,
                [&](auto* data) { pack_group(to, data, small, large, row, first, depth, scale); });
}

// ---- products ----

RMSGD_FN void add_to(double* to, Vector<double> x, bool fresh) { store(to, fresh ? x : load(to) + x); }

RMSGD_FN void add_to(double* to, Vector<float> x, bool fresh) {
  typedef double Wide __attribute__((vector_size(LANES<float> * 8)));
  typedef double Unaligned __attribute__((vector_size(LANES<float> * 8), aligned(8), may_alias));
  Unaligned* target = reinterpret_cast<Unaligned*>(to);
  const Wide wide = __builtin_convertvector(x, Wide);
  *target = fresh ? wide : *target + wide;
}

template <class T>
RMSGD_FN void prefetch_wide(const double* at) {
  for (int byte = 0; byte < int(sizeof(Wide<T>)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(at) + byte, 1);
  }
}

template <class T, int VECTORS>
RMSGD_FN void multiply_tile(const T* left, const T* right, int64_t depth, double* gram, ptrdiff_t stride,
                            bool fresh) {
  constexpr int W = LANES<T>;
  // A large Gram matrix lies in the third-level cache; it comes nearer while the products are formed.
#pragma GCC unroll 8
  for (int r = 0; r < TALL_TILE_ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) prefetch_wide<T>(gram + r * stride + v * W);
  }
  const Tile<T, VECTORS, CHAIN, TALL_TILE_ROWS> tile(left, W, right, W, ptrdiff_t(GRAM_DEPTH) * W, depth);
#pragma GCC unroll 8
  for (int r = 0; r < TALL_TILE_ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) add_to(gram + r * stride + v * W, tile.sum[r][v], fresh);
  }
}

// Rows [top, bottom) of the columns of one tile, from `column` on, `vectors` of them.
template <class T>
void multiply_column(const T* packed, int64_t top, int64_t bottom, int64_t column, int vectors, int64_t depth,
                     double* gram, ptrdiff_t stride, bool fresh) {
  constexpr int W = LANES<T>;
  constexpr ptrdiff_t GROUP = ptrdiff_t(GRAM_DEPTH) * W;
  for (int64_t row = top; row < bottom; row += TALL_TILE_ROWS) {
    const T* left = packed + row / W * GROUP + row % W;
    // On the diagonal, the vectors that lie wholly below it are left out.
    const int below = row > column ? int((row - column) / W) : 0;
    const T* right = packed + (column / W + below) * GROUP;
    double* to = gram + row * stride + column + below * W;
    switch (vectors - below) {
      case 3:
        multiply_tile<T, 3>(left, right, depth, to, stride, fresh);
        break;
      case 2:
        multiply_tile<T, 2>(left, right, depth, to, stride, fresh);
        break;
      case 1:
        multiply_tile<T, 1>(left, right, depth, to, stride, fresh);
        break;
    }
  }
}

// Rows of the left operand that stay in the second-level cache while all columns pass.
constexpr int64_t LEFT_ROWS = 192;

// Adds the products of `depth` packed columns to the Gram matrix, or begins it with them.
template <class T>
void multiply(const T* packed, int64_t padded, int64_t depth, double* out, ptrdiff_t stride, bool fresh,
              const ThreadTeam& team) {
  constexpr int W = LANES<T>;
  constexpr int64_t TILE_COLUMNS = TILE_VECTORS * W;
  for (int64_t top = 0; top < padded; top += LEFT_ROWS) {
    int64_t turn = 0;
    int64_t column = top / TILE_COLUMNS * TILE_COLUMNS;
    for (int vectors; column < padded; column += vectors * W, ++turn) {
      // Four vectors are halved: a single vector's sums are too few to hide the latency of their additions.
      const int64_t left = (padded - column) / W;
      vectors = left == TILE_VECTORS + 1 ? 2 : left < TILE_VECTORS ? int(left) : TILE_VECTORS;
      if (turn % team.size() != team.rank()) continue;
      const int64_t end = column + vectors * W;
      const int64_t bottom = top + LEFT_ROWS < end ? top + LEFT_ROWS : end;
      multiply_column(packed, top, bottom, column, vectors, depth, out, stride, fresh);
    }
  }
}

int64_t depth_from(int64_t first, int64_t columns) {
  return columns - first < GRAM_DEPTH ? columns - first : GRAM_DEPTH;
}

template <class T>
void gram(const MatrixView& matrix, T scale, double* out, ptrdiff_t stride, T* packed,
          const ThreadTeam& team) {
  constexpr int W = LANES<T>;
  const Side small = tidied(matrix.small), large = tidied(matrix.large);
  const int64_t rows = small.length(), columns = large.length();
  const int64_t padded = vectors_up<T>(rows);
  for (int64_t first = 0; first < columns; first += GRAM_DEPTH) {
    const int64_t depth = depth_from(first, columns);
    for (int64_t row = team.rank() * W; row < padded; row += team.size() * W) {
      pack(PackedColumns<T>(packed + row * GRAM_DEPTH, 1, 0), matrix, small, large, row, first, depth, scale);
    }
    team.barrier();
    multiply(packed, padded, depth, out, stride, first == 0, team);
    team.barrier();
  }
}

template <class Source>
Magnitude magnitude_of(const Source* data, const Side& small, const Side& large) {
  Magnitude result = {true, 0.0};
  const int64_t rows = small.length(), runs = large.length() / large.size[3];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t run = 0; run < runs; ++run) {
      const Source* from = data + offset_of(small, row) + offset_of(large, run * large.size[3]);
      for (int64_t k = 0; k < large.size[3]; ++k) {
        const double size = __builtin_fabs(double(widen(from[k * large.stride[3]])));
        if (!(size <= DBL_MAX)) result.finite = false;
        if (size > result.largest) result.largest = size;
      }
    }
  }
  return result;
}

}  // namespace

void gram_f32(const MatrixView& matrix, float scale, double* out, ptrdiff_t stride, float* packed,
              const ThreadTeam& team) {
  gram(matrix, scale, out, stride, packed, team);
}

void gram_f64(const MatrixView& matrix, double scale, double* out, ptrdiff_t stride, double* packed,
              const ThreadTeam& team) {
  gram(matrix, scale, out, stride, packed, team);
}

void pack_positions(const MatrixView& all, int positions, int64_t row, float* packed) {
  const Side small = tidied(all.small), large = tidied(all.large);
  const int64_t rows = small.length(), columns = large.length() / positions;
  const ptrdiff_t apart = packed_position_size(rows, columns);
  const int64_t end = row + PACKED_ROWS < rows ? row + PACKED_ROWS : rows;
  for (; row < end; row += LANES<float>) {
    for (int64_t first = 0; first < columns; first += GRAM_DEPTH) {
      float* const to = packed + packed_chunk(rows, first) + row * GRAM_DEPTH;
      pack(PackedColumns<float>(to, positions, apart), all, small, large, row, first * positions,
           depth_from(first, columns) * positions, 1.0f);
    }
  }
}

void gram_of_packed(int64_t rows, int64_t columns, const float* packed, double* out, ptrdiff_t stride) {
  const ThreadTeam alone(0, 1, nullptr);
  for (int64_t first = 0; first < columns; first += GRAM_DEPTH) {
    multiply(packed + packed_chunk(rows, first), vectors_up<float>(rows), depth_from(first, columns), out,
             stride, first == 0, alone);
  }
}

void product_spread(const MatrixView& matrix, float scale, const double* left, double* spread,
                    double* energies, float* packed, const ThreadTeam& team) {
  constexpr int W = LANES<float>;
  const Side small = tidied(matrix.small), large = tidied(matrix.large);
  const int64_t rows = small.length(), columns = large.length();
  for (int64_t first = 0; first < columns; first += GRAM_DEPTH) {
    const int64_t depth = depth_from(first, columns);
    for (int64_t row = team.rank() * W; row < rows; row += team.size() * W) {
      float* const block = packed + row * GRAM_DEPTH;
      pack(PackedColumns<float>(block, 1, 0), matrix, small, large, row, first, depth, scale);
      Vector<float> squares = {};
      for (int64_t k = 0; k < depth; ++k) squares += load(block + k * W) * load(block + k * W);
      for (int r = 0; r < W; ++r) energies[row + r] = double(squares[r]);
    }
    team.barrier();
    double sum = 0.0;
    for (int64_t i = 0; i < rows; ++i) sum += left[i] * energies[i];
    for (int64_t row = team.rank() * W; row < rows; row += team.size() * W) {
      for (int64_t i = row; i < row + W; ++i) spread[i] = energies[i] * sum + (first > 0 ? spread[i] : 0.0);
    }
    team.barrier();
  }
}

Magnitude magnitude(const MatrixView& matrix) {
  const Side small = tidied(matrix.small), large = tidied(matrix.large);
  return with_elements(matrix.dtype, matrix.data,
                       [&](auto* data) { return magnitude_of(data, small, large); });
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
