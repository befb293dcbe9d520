// Gram matrices G = A A^T of many weights of different shapes at once.
//
// The upper triangle of every G is cut into tiles of GRAM_TILE rows and columns, the columns of A (M of
// them, up to 50 L) into `splits` parts where there are few tiles. A block of GRAM_THREADS threads
// computes one tile over one part: plain fp32 (or fp64) multiply-adds, so no setting of the user's can
// make it TF32. Partial tiles are added in a fixed order: the same weights give the same bits.
//
// Counted: a step of 16 columns costs a thread 256 multiply-adds and 32 shared loads of 16 bytes. ResNet18 is
// 4.8 G multiply-adds in all (the symmetric half, whole tiles counted), ResNet50 8.8 G, heads of 1000 classes
// included. No tensor cores: three products of TF32 keep 2^-22 of a product, four times fp32's rounding, and
// the accuracy guard would send as many more matrices to fp64.
#pragma once

#include "../element.h"
#include "../matrix.h"
#include "slabs.h"

namespace rmsgd {

constexpr int GRAM_TILE = 64;
constexpr int GRAM_DEPTH = 16;     // columns of A in shared memory at a time
constexpr int GRAM_CHAIN = 256;    // longest sum formed in fp32 before it is added to the rest
constexpr int GRAM_THREADS = 256;  // 16 x 16, each with 4 x 4 sums
constexpr int GRAM_STRIDE = GRAM_TILE + 4;

// The reduction of one Gram matrix to tridiagonal form, in one precision.
struct CudaReduction {
  long long matrix;   // place in the workspace, in bytes: the Gram matrix, in slabs
  long long vectors;  // what the reduction needs besides and what comes of it, see ReductionVectors
  int blocks;         // of the team
  int near_rows;      // whether a block keeps its rows in shared memory
  int near_slab;      // and its slab
  int unused;
};

// What is known of one L x M weight. The innermost dimension of a side is its last of four.
struct CudaMatrix {
  const void* weight;
  Side small;  // L, the rows
  Side large;  // M, the columns
  long long M;
  long long partial;  // place in the workspace: tiles x splits partial tiles of floats, unless splits is 1
  CudaReduction reduction[2];  // in fp32 and in fp64
  int L;
  Dtype dtype;
  int stride;  // of the Gram matrix: L rounded up to SLAB_PACK
  int splits;  // of the columns, in the fp32 Gram matrix
};

RMSGD_FN Slabs slabs_of(const CudaMatrix& matrix, int stage) {
  return {matrix.L, matrix.stride, matrix.reduction[stage].blocks};
}

struct GramItem {
  int matrix;
  int row_tile;
  int column_tile;
  int split;
};

RMSGD_FN long long offset_of(const Side& side, unsigned index) {
  long long offset = 0;
  for (int d = 3; d > 0 && index > 0; --d) {
    const unsigned size = unsigned(side.size[d]);
    offset += index % size * side.stride[d];
    index /= size;
  }
  return offset + index * side.stride[0];
}

// Index of a tile among those of the upper triangle.
RMSGD_FN int tile_number(int row_tile, int column_tile, int tiles) {
  return row_tile * tiles - row_tile * (row_tile - 1) / 2 + column_tile - row_tile;
}

RMSGD_FN int tiles_of(int L) { return (L + GRAM_TILE - 1) / GRAM_TILE; }

// A part of the columns.
struct ColumnPart {
  long long begin;
  long long end;
};

RMSGD_FN ColumnPart column_part(const CudaMatrix& matrix, int splits, int split) {
  const long long width = (matrix.M + splits - 1) / splits;
  const long long begin = split * width;
  return {begin, begin + width < matrix.M ? begin + width : matrix.M};
}

// What a block keeps in shared memory.
template <class T>
struct GramShared {
  T left[GRAM_DEPTH][GRAM_STRIDE];
  T right[GRAM_DEPTH][GRAM_STRIDE];
  long long left_row[GRAM_TILE];
  long long right_row[GRAM_TILE];
  long long column[GRAM_CHAIN];
};

// One tile over one part of the columns. Team: GRAM_THREADS members.
template <class Element, class T, class Team>
RMSGD_FN void gram_tile(Team& team, const CudaMatrix& matrix, const Element* weight, const GramItem& item,
                        int splits, const Slabs& slabs, T* gram, T* partial, GramShared<T>& shared) {
  const int rank = team.rank();
  const int top = item.row_tile * GRAM_TILE, left = item.column_tile * GRAM_TILE;
  const int rows = matrix.L - top < GRAM_TILE ? matrix.L - top : GRAM_TILE;
  const int columns = matrix.L - left < GRAM_TILE ? matrix.L - left : GRAM_TILE;
  for (int i = rank; i < GRAM_TILE; i += team.size()) {
    shared.left_row[i] = offset_of(matrix.small, unsigned(top + (i < rows ? i : 0)));
    shared.right_row[i] = offset_of(matrix.small, unsigned(left + (i < columns ? i : 0)));
  }

  // Neighbouring threads read neighbouring elements of memory: along columns, or along rows where
  // those are contiguous.
  const bool along_rows = matrix.small.stride[3] == 1;
  const int load_row = along_rows ? rank % GRAM_TILE : rank / GRAM_DEPTH;
  const int load_column = along_rows ? rank / GRAM_TILE : rank % GRAM_DEPTH;
  constexpr int LOADS = GRAM_TILE * GRAM_DEPTH / GRAM_THREADS;
  const int row_step = along_rows ? 0 : GRAM_THREADS / GRAM_DEPTH;
  const int column_step = along_rows ? GRAM_THREADS / GRAM_TILE : 0;

  const int y = rank / 16 * 4, x = rank % 16 * 4;
  T total[4][4] = {};
  const ColumnPart part = column_part(matrix, splits, item.split);
  for (long long chain = part.begin; chain < part.end; chain += GRAM_CHAIN) {
    const int depth = part.end - chain < GRAM_CHAIN ? int(part.end - chain) : GRAM_CHAIN;
    team.barrier();  // the last chain's offsets are read
    for (int k = rank; k < depth; k += team.size()) {
      shared.column[k] = offset_of(matrix.large, unsigned(chain + k));
    }
    T sum[4][4] = {};
    for (int step = 0; step < depth; step += GRAM_DEPTH) {
      team.barrier();  // the offsets are written, the last step's columns are read
      // All loads before the first store: a store between them would wait for the one before it.
      T to_left[LOADS], to_right[LOADS];
#pragma unroll
      for (int load = 0; load < LOADS; ++load) {
        const int r = load_row + load * row_step, k = load_column + load * column_step;
        const bool inside = step + k < depth;
        const long long column = inside ? shared.column[step + k] : 0;
        to_left[load] = inside && r < rows ? T(widen(weight[shared.left_row[r] + column])) : T(0);
        to_right[load] = inside && r < columns ? T(widen(weight[shared.right_row[r] + column])) : T(0);
      }
#pragma unroll
      for (int load = 0; load < LOADS; ++load) {
        const int r = load_row + load * row_step, k = load_column + load * column_step;
        shared.left[k][r] = to_left[load];
        shared.right[k][r] = to_right[load];
      }
      team.barrier();
#pragma unroll
      for (int k = 0; k < GRAM_DEPTH; ++k) {
        Pack<T, 4> a, b;
        a.load(&shared.left[k][y], true);
        b.load(&shared.right[k][x], true);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] += a.value[i] * b.value[j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) total[i][j] += sum[i][j];
    }
  }

  if (splits > 1) {
    const int tile = tile_number(item.row_tile, item.column_tile, tiles_of(matrix.L));
    T* const to = partial + ((long long)tile * splits + item.split) * GRAM_TILE * GRAM_TILE;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) to[(y + i) * GRAM_TILE + x + j] = total[i][j];
    }
    return;
  }
  // Columns that only fill up a row are zero.
  const int row = top + y, column = left + x, stride = slabs.packs * SLAB_PACK;
  for (int i = 0; i < 4 && column < stride; ++i) {
    if (row + i >= slabs.n) break;
    Pack<T, 4> pack;
    for (int j = 0; j < 4; ++j) pack.value[j] = total[i][j];
    pack.store(gram + slabs.place(row + i, column), true);
  }
  for (int j = 0; j < 4 && top != left; ++j) {
    if (column + j >= slabs.n) break;
    Pack<T, 4> pack;
    for (int i = 0; i < 4; ++i) pack.value[i] = total[i][j];
    pack.store(gram + slabs.place(column + j, row), true);
  }
}

// Adds up the parts of one tile, in order, in fp64.
template <class Team>
RMSGD_FN void add_partial_tiles(Team& team, const CudaMatrix& matrix, const GramItem& item,
                                const Slabs& slabs, float* gram, const float* partial) {
  const int tile = tile_number(item.row_tile, item.column_tile, tiles_of(matrix.L));
  const float* const from = partial + (long long)tile * matrix.splits * GRAM_TILE * GRAM_TILE;
  for (int i = team.rank(); i < GRAM_TILE * GRAM_TILE; i += team.size()) {
    const int row = item.row_tile * GRAM_TILE + i / GRAM_TILE;
    const int column = item.column_tile * GRAM_TILE + i % GRAM_TILE;
    if (row >= matrix.L || column >= matrix.stride) continue;
    double sum = 0.0;
    for (int split = 0; split < matrix.splits; ++split)
      sum += double(from[split * GRAM_TILE * GRAM_TILE + i]);
    gram[slabs.place(row, column)] = float(sum);
    if (item.row_tile != item.column_tile && column < matrix.L) gram[slabs.place(column, row)] = float(sum);
  }
}

}  // namespace rmsgd
