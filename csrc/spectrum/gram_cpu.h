// Gram matrices of weights: G = (scale A)(scale A)^T, upper triangle, in double.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../isa.h"
#include "../matrix.h"
#include "thread_team.h"

namespace rmsgd {

// So many columns are packed and multiplied at a time. Sums of so many products are formed in the precision
// of the product, and added up in double. The rounding error of a long row (M up to 50 L) then grows with its
// square root only, from that of 256 terms.
constexpr int GRAM_DEPTH = 256;

// Elements of the buffer for packed columns.
RMSGD_FN ptrdiff_t gram_packed_size(ptrdiff_t rows) { return (rows + 15) / 16 * 16 * GRAM_DEPTH; }

// Rows that pack_positions packs at a time, and where its results are, in elements: the first of the columns
// of a chunk of GRAM_DEPTH, among those of one position, and that of the next position. A multiple of 4 KiB
// would make all positions compete for the same lines of the cache.
constexpr int PACKED_ROWS = 16;
RMSGD_FN ptrdiff_t packed_chunk(ptrdiff_t rows, ptrdiff_t first_column) {
  return (rows + 15) / 16 * 16 * first_column;
}
RMSGD_FN ptrdiff_t packed_position_size(ptrdiff_t rows, ptrdiff_t columns) {
  return packed_chunk(rows, (columns + GRAM_DEPTH - 1) / GRAM_DEPTH * GRAM_DEPTH) + 5 * 16;
}

// What the values of a matrix allow.
struct Magnitude {
  bool finite;
  double largest;  // max |a|; meaningless unless finite
};

}  // namespace rmsgd

// Row i of G starts at gram[i * stride]. Columns i..L-1 are written, and their neighbours, rounded down and
// up to whole vectors; rows likewise; what lies beyond L is zero. stride and rows hold at least L rounded up
// to 16. gram_f32 multiplies in fp32 (for f32, f16 and bf16 weights), gram_f64 in fp64 (any weight).
// pack_positions and gram_of_packed: the same as gram_f32 with a scale of 1, of several matrices with the
// same sides that were packed together. `all` is the matrix that has their columns in turn, those with the
// same number side by side as neighbours in memory. Rows `row` up to row + PACKED_ROWS are packed.
// product_spread: with the squares e_bi of the rows i within the blocks b of GRAM_DEPTH columns, the rows of
// sum_b e_bi sum_j left_j e_bj, on which the rounding of gram_f32 depends (product_error_of_rest in stage.h).
// left, spread and energies (scratch): as many as rows, rounded up to 16.
RMSGD_EACH_ISA(void gram_f32(const MatrixView& matrix, float scale, double* gram, ptrdiff_t stride,
                             float* packed, const ThreadTeam& team);
               void gram_f64(const MatrixView& matrix, double scale, double* gram, ptrdiff_t stride,
                             double* packed, const ThreadTeam& team);
               void pack_positions(const MatrixView& all, int positions, int64_t row, float* packed);
               void gram_of_packed(int64_t rows, int64_t columns, const float* packed, double* gram,
                                   ptrdiff_t stride);
               void product_spread(const MatrixView& matrix, float scale, const double* left, double* spread,
                                   double* energies, float* packed, const ThreadTeam& team);
               Magnitude magnitude(const MatrixView& matrix);)
