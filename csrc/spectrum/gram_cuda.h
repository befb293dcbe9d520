// Gram matrices G = A A^T of many weights of different shapes at once.
//
// The upper triangle of every G is cut into tiles of GRAM_TILE rows and columns, and the columns of A (M of
// them, up to 50 L) are cut into `splits` parts where there are few tiles. In fp32 a block of GRAM_THREADS
// threads computes two tiles, one below the other, over one part: its threads then load three packs for 32
// multiply-adds. A block whose upper tile is on the diagonal computes that tile alone, since the one below it
// is a mirror image. In fp64 every block computes one tile. The multiply-adds are plain ones, so no setting
// of the user's can make them TF32. Parts of a tile are added in a fixed order: the same weights give the
// same bits.
//
// The next columns are loaded while the present ones are multiplied, into the other half of shared memory, so
// that threads wait for each other once per GRAM_DEPTH columns.
//
// The columns of every tile on the diagonal are rows of A that exactly one block has there. That block also
// takes their fingerprint in the fp32 kernel.
//
// A step of GRAM_DEPTH columns costs a thread 256 multiply-adds, 24 loads of 16 bytes from shared memory and
// 6 elements from global memory. ResNet18 takes 4.8 G multiply-adds in all, and ResNet50 takes 8.8 G (the
// upper triangle in whole tiles, with heads of 1000 classes). There are no tensor cores: three products of
// TF32 keep 2^-22 of a product, four times fp32's rounding, and the accuracy guard would send as many more
// matrices to fp64.
#pragma once

#include "../element.h"
#include "../matrix.h"
#include "slabs.h"
#include "stage.h"

namespace rmsgd {

constexpr int GRAM_TILE = 64;
constexpr int GRAM_DEPTH = 8;      // columns of A in one half of shared memory
constexpr int GRAM_CHAIN = 256;    // the longest sum in fp32 that is formed before it is added to the rest
constexpr int GRAM_THREADS = 256;  // 16 x 16, each with 4 x 4 sums of a tile

// The reduction of one Gram matrix to tridiagonal form, in one precision.
struct CudaReduction {
  long long matrix;   // place in the workspace, in bytes: the Gram matrix, in slabs
  long long vectors;  // the place of its vectors and of its result, see ReductionVectors
  int blocks;         // of the team
  int near_rows;      // whether a block keeps its rows in shared memory
  int near_slab;      // and its slab
  int unused;
};

// One L x M weight. The innermost dimension of a side is the last of its four.
struct CudaMatrix {
  const void* weight;
  Side small;  // L, the rows
  Side large;  // M, the columns
  long long M;
  long long partial;  // the place of tiles x splits parts of tiles in the workspace, unless splits is 1
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

// The index of a tile among those of the upper triangle.
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

// The tiles that a block computes, one below the other, at most.
template <class T>
RMSGD_FN constexpr int gram_tiles() {
  return sizeof(T) == 4 ? 2 : 1;
}

// The contents of a block's shared memory.
template <class T>
struct GramShared {
  static constexpr int ROWS = gram_tiles<T>() * GRAM_TILE;
  // Threads that store neighbouring columns of A do not wait for one bank.
  T left[2][GRAM_DEPTH][ROWS + 4];
  T right[2][GRAM_DEPTH][GRAM_TILE + 4];
  // Offsets in the weight, in bytes, of the tiles' rows and of the columns of two chains.
  long long left_row[ROWS];
  long long right_row[GRAM_TILE];
  long long column[2 * GRAM_CHAIN];
};

// Whether a block of the fp32 kernel takes the fingerprint of the rows of A that are its tiles' columns.
RMSGD_FN bool takes_fingerprint(const GramItem& item) { return item.column_tile / 2 == item.row_tile / 2; }

// How the threads share the elements of GRAM_DEPTH columns of ROWS rows, to load them. Neighbouring threads
// take neighbouring elements of memory: along columns, or along rows where those are contiguous.
template <int ROWS, bool along_rows>
struct GramLoads {
  static constexpr int COUNT = ROWS * GRAM_DEPTH / GRAM_THREADS;  // per thread
  int first_row, first_column;

  RMSGD_FN explicit GramLoads(int rank)
      : first_row(along_rows ? rank % ROWS : rank / GRAM_DEPTH),
        first_column(along_rows ? rank / ROWS : rank % GRAM_DEPTH) {}

  RMSGD_FN int row(int load) const {
    return first_row + (along_rows ? 0 : load * (GRAM_THREADS / GRAM_DEPTH));
  }
  RMSGD_FN int column(int load) const {
    return first_column + (along_rows ? load * (GRAM_THREADS / ROWS) : 0);
  }
};

// Loads a thread's share of the columns from `step` on; those from `width` on are zero. `row` and `column`
// are offsets in bytes. The part of them that all elements of the thread have in common is read once.
template <int ROWS, bool along_rows, class Element, class T>
RMSGD_FN void load_elements(const GramLoads<ROWS, along_rows>& mine, const Element* weight,
                            const long long* row, const long long* column, int step, int width, T* to) {
  const char* const common =
      reinterpret_cast<const char*>(weight) + (along_rows ? row[mine.row(0)] : column[mine.column(0)]);
#pragma unroll
  for (int load = 0; load < mine.COUNT; ++load) {
    to[load] = T(0);
    if (step + mine.column(load) >= width) continue;
    const long long offset = along_rows ? column[mine.column(load)] : row[mine.row(load)];
    to[load] = T(widen(*reinterpret_cast<const Element*>(common + offset)));
  }
}

// The parts of the columns of A in one precision.
template <class T>
RMSGD_FN int splits_of(const CudaMatrix& matrix) {
  return sizeof(T) == 4 ? matrix.splits : 1;
}

// Stores one tile: 4 x 4 sums of each thread, from row y and column x of the tile on.
template <class T>
RMSGD_FN void store_tile(const CudaMatrix& matrix, int row_tile, int column_tile, int split,
                         unsigned char* workspace, int y, int x, const T (&sum)[4][4]) {
  const int splits = splits_of<T>(matrix);
  if (splits > 1) {
    const int tile = tile_number(row_tile, column_tile, tiles_of(matrix.L));
    T* const to = reinterpret_cast<T*>(workspace + matrix.partial) +
                  ((long long)tile * splits + split) * GRAM_TILE * GRAM_TILE;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Pack<T, 4> pack;
      for (int j = 0; j < 4; ++j) pack.value[j] = sum[i][j];
      pack.store(to + (y + i) * GRAM_TILE + x, true);
    }
    return;
  }
  T* const gram = reinterpret_cast<T*>(workspace + matrix.reduction[stage_of<T>()].matrix);
  const Slabs slabs = slabs_of(matrix, stage_of<T>());
  // Columns that only fill up a row are zero.
  const int row = row_tile * GRAM_TILE + y, column = column_tile * GRAM_TILE + x;
  const int stride = slabs.packs * SLAB_PACK;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column >= stride || row + i >= slabs.n) break;
    Pack<T, 4> pack;
    for (int j = 0; j < 4; ++j) pack.value[j] = column + j < slabs.n ? sum[i][j] : T(0);
    pack.store(gram + slabs.place(row + i, column), true);
  }
  if (row_tile == column_tile) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (column + j >= slabs.n) break;
    Pack<T, 4> pack;
    for (int i = 0; i < 4; ++i) pack.value[i] = sum[i][j];
    pack.store(gram + slabs.place(column + j, row), true);
  }
}

// `tiles` tiles over one part of the columns, the first one that of the item. along_rows: whether the rows
// are neighbours in memory. The team has GRAM_THREADS members. The matrix and the item lie in global memory
// and are read where they are needed, for want of registers.
template <int tiles, bool along_rows, class Element, class T, class Team>
RMSGD_FN void multiply_tiles(Team& team, const CudaMatrix& matrix, const Element* weight,
                             const GramItem& item, unsigned char* workspace, GramShared<T>& shared) {
  constexpr int ROWS = tiles * GRAM_TILE;
  typedef GramLoads<ROWS, along_rows> Left;
  typedef GramLoads<GRAM_TILE, along_rows> Right;
  const int rank = team.rank();
  const ColumnPart part = column_part(matrix, splits_of<T>(matrix), item.split);
  const int width = int(part.end - part.begin);

  // Rows that the matrix does not have are another row's, and their sums are not stored.
  const int top = item.row_tile * GRAM_TILE, left = item.column_tile * GRAM_TILE;
  for (int i = rank; i < ROWS; i += GRAM_THREADS) {
    const int row = top + i < matrix.L ? top + i : top;
    shared.left_row[i] = offset_of(matrix.small, unsigned(row)) * int(sizeof(Element));
  }
  for (int i = rank; i < GRAM_TILE; i += GRAM_THREADS) {
    const int row = left + i < matrix.L ? left + i : left;
    shared.right_row[i] = offset_of(matrix.small, unsigned(row)) * int(sizeof(Element));
  }
  const auto list_columns = [&](int chain) {
    const int k = chain + rank;
    if (k >= width) return;
    shared.column[k % (2 * GRAM_CHAIN)] =
        offset_of(matrix.large, unsigned(part.begin + k)) * int(sizeof(Element));
  };
  list_columns(0);
  team.barrier();

  const Left to_left(rank);
  const Right to_right(rank);
  T left_ahead[Left::COUNT], right_ahead[Right::COUNT];
  const auto load_columns = [&](int step) {
    const long long* const column = shared.column + step % (2 * GRAM_CHAIN);
    load_elements(to_left, weight, shared.left_row, column, step, width, left_ahead);
    load_elements(to_right, weight, shared.right_row, column, step, width, right_ahead);
  };

  // The threads of a warp are neighbours in both directions, so that its loads of shared memory share words.
  const int warp = rank / 32, lane = rank % 32;
  const int y = (warp / 2 * 4 + lane / 8) * 4, x = (warp % 2 * 8 + lane % 8) * 4;
  T total[tiles][4][4] = {};
  load_columns(0);
  for (int chain = 0; chain < width; chain += GRAM_CHAIN) {
    // Nobody reads the offsets of the chain before this one any more.
    list_columns(chain + GRAM_CHAIN);
    const int end = chain + GRAM_CHAIN < width ? chain + GRAM_CHAIN : width;
    T sum[tiles][4][4] = {};
#pragma unroll 1
    for (int step = chain; step < end; step += GRAM_DEPTH) {
      const int half = step / GRAM_DEPTH % 2;
#pragma unroll
      for (int load = 0; load < Left::COUNT; ++load) {
        shared.left[half][to_left.column(load)][to_left.row(load)] = left_ahead[load];
      }
#pragma unroll
      for (int load = 0; load < Right::COUNT; ++load) {
        shared.right[half][to_right.column(load)][to_right.row(load)] = right_ahead[load];
      }
      // The columns are there, and all have multiplied those that the next step overwrites.
      team.barrier();
      load_columns(step + GRAM_DEPTH);
#pragma unroll
      for (int k = 0; k < GRAM_DEPTH; ++k) {
        Pack<T, 4> a[tiles], b;
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
          a[tile].load(&shared.left[half][k][tile * GRAM_TILE + y], true);
        }
        b.load(&shared.right[half][k][x], true);
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[tile][i][j] += a[tile].value[i] * b.value[j];
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) total[tile][i][j] += sum[tile][i][j];
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    store_tile(matrix, item.row_tile + tile, item.column_tile, item.split, workspace, y, x, total[tile]);
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
    gram[slabs.place(row, column)] = column < matrix.L ? float(sum) : 0.0f;  // those fill up a row
    if (item.row_tile != item.column_tile && column < matrix.L) gram[slabs.place(column, row)] = float(sum);
  }
}

}  // namespace rmsgd
