// Gram matrices of weights: G = (scale A)(scale A)^T, upper triangle, in double.
#pragma once

#include <stddef.h>

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

// What the values of a matrix allow.
struct Magnitude {
  bool finite;
  double largest;  // max |a|; meaningless unless finite
};

}  // namespace rmsgd

// Row i of G starts at gram[i * stride]. Columns i..L-1 are written, and their neighbours, rounded down and
// up to whole vectors; rows likewise; what lies beyond L is zero. stride and rows hold at least L rounded up
// to 16. gram_f32 multiplies in fp32 (for f32, f16 and bf16 weights), gram_f64 in fp64 (any weight).
// product_spread: with the squares e_bi of the rows i within the blocks b of GRAM_DEPTH columns, the rows of
// sum_b e_bi sum_j left_j e_bj, on which the rounding of gram_f32 depends (product_error_of_rest in stage.h).
// left, spread and energies (scratch): as many as rows, rounded up to 16.
RMSGD_EACH_ISA(void gram_f32(const MatrixView& matrix, float scale, double* gram, ptrdiff_t stride,
                             float* packed, const ThreadTeam& team);
               void gram_f64(const MatrixView& matrix, double scale, double* gram, ptrdiff_t stride,
                             double* packed, const ThreadTeam& team);
               void product_spread(const MatrixView& matrix, float scale, const double* left, double* spread,
                                   double* energies, float* packed, const ThreadTeam& team);
               Magnitude magnitude(const MatrixView& matrix);)
