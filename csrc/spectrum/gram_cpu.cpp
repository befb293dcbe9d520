#include "gram_cpu.h"

#include <float.h>

#include "../half.h"
#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

// ---- elements of a weight ----

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

RMSGD_FN float widen(float x) { return x; }
RMSGD_FN double widen(double x) { return x; }
RMSGD_FN float widen(BFloat x) { return float_of_bfloat16(x.bits); }
RMSGD_FN float widen(Half x) { return float_of_float16(x.bits); }

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

RMSGD_FN int64_t length_of(const Side& side) {
  return side.size[0] * side.size[1] * side.size[2] * side.size[3];
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

// Writes W rows of `length` columns of one stride, column after column: to[k * W + r].
template <class T, class Source>
RMSGD_FN void pack_run(T* to, const Source* from, const int64_t* rows, int64_t stride, int64_t length,
                       T scale) {
  constexpr int W = LANES<T>;
  for (int64_t k = 0; k < length; ++k) {
    for (int r = 0; r < W; ++r) to[k * W + r] = T(widen(from[rows[r] + k * stride])) * scale;
  }
}

// Packs columns [first, first + depth) of the W rows from `row` on; rows beyond the last are zero.
template <class T, class Source>
void pack_group(T* to, const Source* data, const Side& small, const Side& large, int64_t row, int64_t first,
                int64_t depth, T scale) {
  constexpr int W = LANES<T>;
  const int64_t count = length_of(small) - row;
  int64_t rows[W];
  for (int r = 0; r < W; ++r) rows[r] = offset_of(small, r < count ? row + r : row);
  const int64_t run = large.size[3], stride = large.stride[3];
  for (int64_t done = 0; done < depth;) {
    const int64_t column = first + done;
    const int64_t within = column % run;
    const int64_t length = run - within < depth - done ? run - within : depth - done;
    pack_run(to + done * W, data + offset_of(large, column), rows, stride, length, scale);
    done += length;
  }
  for (int64_t r = count; r < W; ++r) {
    for (int64_t k = 0; k < depth; ++k) to[k * W + r] = T(0);
  }
}

template <class T>
void pack(T* to, const MatrixView& matrix, const Side& small, const Side& large, int64_t row, int64_t first,
          int64_t depth, T scale) {
  switch (matrix.dtype) {
    case Dtype::float32:
      return pack_group(to, static_cast<const float*>(matrix.data), small, large, row, first, depth, scale);
    case Dtype::float64:
      return pack_group(to, static_cast<const double*>(matrix.data), small, large, row, first, depth, scale);
    case Dtype::float16:
      return pack_group(to, static_cast<const Half*>(matrix.data), small, large, row, first, depth, scale);
    case Dtype::bfloat16:
      return pack_group(to, static_cast<const BFloat*>(matrix.data), small, large, row, first, depth, scale);
  }
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

template <class T, int VECTORS>
RMSGD_FN void multiply_tile(const T* left, const T* right, int64_t depth, double* gram, ptrdiff_t stride,
                            bool fresh) {
  constexpr int W = LANES<T>;
  const Tile<T, VECTORS> tile(left, W, right, W, ptrdiff_t(GRAM_DEPTH) * W, depth);
#pragma GCC unroll 4
  for (int r = 0; r < TILE_ROWS; ++r) {
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
  for (int64_t row = top; row < bottom; row += TILE_ROWS) {
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

template <class T>
void gram(const MatrixView& matrix, T scale, double* out, ptrdiff_t stride, T* packed,
          const ThreadTeam& team) {
  constexpr int W = LANES<T>;
  constexpr int64_t TILE_COLUMNS = TILE_VECTORS * W;
  const Side small = tidied(matrix.small), large = tidied(matrix.large);
  const int64_t rows = length_of(small), columns = length_of(large);
  const int64_t padded = vectors_up<T>(rows);
  for (int64_t first = 0; first < columns; first += GRAM_DEPTH) {
    const int64_t depth = columns - first < GRAM_DEPTH ? columns - first : GRAM_DEPTH;
    for (int64_t row = team.rank() * W; row < padded; row += team.size() * W) {
      pack(packed + row * GRAM_DEPTH, matrix, small, large, row, first, depth, scale);
    }
    team.barrier();
    for (int64_t top = 0; top < padded; top += LEFT_ROWS) {
      int64_t turn = 0;
      for (int64_t column = top / TILE_COLUMNS * TILE_COLUMNS; column < padded;
           column += TILE_COLUMNS, ++turn) {
        if (turn % team.size() != team.rank()) continue;
        const int64_t end = column + TILE_COLUMNS < padded ? column + TILE_COLUMNS : padded;
        const int64_t bottom = top + LEFT_ROWS < end ? top + LEFT_ROWS : end;
        multiply_column(packed, top, bottom, column, int((end - column) / W), depth, out, stride, first == 0);
      }
    }
    team.barrier();
  }
}

template <class Source>
Magnitude magnitude_of(const Source* data, const Side& small, const Side& large) {
  Magnitude result = {true, 0.0};
  const int64_t rows = length_of(small), runs = length_of(large) / large.size[3];
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

Magnitude magnitude(const MatrixView& matrix) {
  const Side small = tidied(matrix.small), large = tidied(matrix.large);
  switch (matrix.dtype) {
    case Dtype::float64:
      return magnitude_of(static_cast<const double*>(matrix.data), small, large);
    case Dtype::float16:
      return magnitude_of(static_cast<const Half*>(matrix.data), small, large);
    case Dtype::bfloat16:
      return magnitude_of(static_cast<const BFloat*>(matrix.data), small, large);
    default:
      return magnitude_of(static_cast<const float*>(matrix.data), small, large);
  }
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
