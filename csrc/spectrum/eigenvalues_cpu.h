// The largest eigenvalues of a symmetric tridiagonal matrix, from Sturm counts.
#pragma once

#include <stddef.h>

#include "../isa.h"
#include "../team.h"

namespace rmsgd {

// Doubles of the workspace of largest_eigenvalues.
RMSGD_FN ptrdiff_t eigenvalues_work_size(ptrdiff_t n) { return 11 * n + 64; }

}  // namespace rmsgd

// The matrix is given by its diagonal (n) and by the squares of its off-diagonal (n - 1), none below
// SMALLEST_SQUARE; its norm is about 1.
//
// count_above: above[k] is the number of eigenvalues larger than shifts[k].
// largest_eigenvalues: the `count` largest, descending, each within half of `tolerance` or of `relative`
// times itself, whichever is more; all of them are known to lie between lower and upper.
namespace rmsgd {
// Off-diagonal elements of 2^-60 change no eigenvalue that double could tell; smaller ones would let the
// sequence of determinants underflow between two rescalings.
constexpr double SMALLEST_SQUARE = 0x1p-120;
}  // namespace rmsgd
RMSGD_EACH_ISA(void count_above(const double* diagonal, const double* squares, int n, const double* shifts,
                                int shift_count, int* above);
               void largest_eigenvalues(const double* diagonal, const double* squares, int n, int count,
                                        double lower, double upper, double tolerance, double relative,
                                        double* values, double* work);)
