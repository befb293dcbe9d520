// A few large eigenvalues are taken off a Gram matrix in double, before the rest of it is reduced in fp32.
//
// A strong mean or outlier columns give a weight a few eigenvalues a thousand times as large as those that
// EVBMF has to tell from noise. The errors of a reduction are in proportion to the largest one, those of the
// product are not (product_error in stage.h). So the large ones are found by subspace iteration, V (L, k)
// with V^T V = 1, and (1 - V V^T) G (1 - V V^T) is left, whose eigenvalues are k zeros and, beside the k Ritz
// values, those of G. What couples the two parts, R = (1 - V V^T) G V, moves an eigenvalue by |R|^2 / gap at
// most, gap being the distance between the Ritz values and the rest (R. Mathias, SIAM J. Matrix Anal. Appl.
// 19, 1998).
#pragma once

#include <stddef.h>

#include "../isa.h"
#include "../team.h"

namespace rmsgd {

// So many are looked for at first, and so many where all of the first ones are large: values of much the same
// size are only found together.
constexpr int FEW_DEFLATED = 8, MOST_DEFLATED = 32;

// Fewer rows are reduced in double instead, which takes no longer than to look.
constexpr int DEFLATE_LEAST = 64;

// How unequal eigenvalues are, n sum lambda^2 / trace^2: 1 for equal ones, and at most the largest one over
// their mean. Below SOME_LARGE none is worth taking off. A reduction in fp32 without taking any off is tried
// first up to SURELY_LARGE: the weights that networks come to reach 50, and the guard passes nearly all.
constexpr double SOME_LARGE = 6.0;
constexpr double SURELY_LARGE = 64.0;

struct Deflation {
  bool looked;  // whether the eigenvalues were unequal enough to look for large ones
  int count;
  double values[MOST_DEFLATED];  // descending
  double coupling;               // |R|_F^2
};

// Doubles of scratch.
RMSGD_FN ptrdiff_t deflation_work_size(ptrdiff_t stride) { return 2 * MOST_DEFLATED * stride; }

}  // namespace rmsgd

// gram: (n, n) as gram_f32 leaves it, of this trace. What is taken off is in the result; where there is
// nothing to gain, or the eigenvalues are less unequal than `least`, gram is as it was. left: (n), the
// diagonal of 1 - V V^T, written if `looked`.
RMSGD_EACH_ISA(Deflation deflate(double* gram, int n, ptrdiff_t stride, double trace, double least,
                                 double* left, double* work);)
