// Reduction of a large symmetric matrix to a band by products of matrices, and of the band to tridiagonal
// form, keeping its eigenvalues.
//
// The reduction in tridiagonal_cpu.h reads the rest of the matrix once per row, which takes as long as the
// memory needs to deliver it. Here BAND rows at a time are made zero beyond a band, so that the rest is read
// once per BAND rows and the work on it is a product of matrices (C. Bischof, B. Lang, X. Sun, ACM
// Transactions on Mathematical Software 26, 2000). The band fits into a cache, and reflections of length BAND
// make it tridiagonal.
#pragma once

#include <stddef.h>

#include "../isa.h"
#include "thread_team.h"

namespace rmsgd {

// Elements of a row beside the diagonal, which is a whole number of a tile's columns in every instruction
// set.
constexpr int BAND = 48;

// Row i of the band in memory: column j of it is band[i * BAND_STRIDE + j], for j from i - BAND + 1 to
// i + 2 BAND - 1 and as many more on either side as whole vectors reach. Neighbouring rows overlap nowhere.
constexpr ptrdiff_t BAND_STRIDE = 160;
RMSGD_FN ptrdiff_t band_size(ptrdiff_t n) { return (n + 2 * BAND + 2) * (BAND_STRIDE + 1); }

// The products A V are summed in so many parts by rows and by columns of A, each by one thread and in a fixed
// order: the result does not depend on the number of threads, of which BAND_PARTS^2 can share the work.
constexpr int BAND_PARTS = 4;

// Elements of the workspace. The band and the counters of the sweeps take the place of the rest in the end.
RMSGD_FN ptrdiff_t band_work_size(ptrdiff_t n, ptrdiff_t stride) {
  const ptrdiff_t panels = (4 + BAND_PARTS) * BAND * (stride + (n + 15) / 16 * 16) + 6 * BAND * BAND;
  const ptrdiff_t band = 2 * (band_size(n) + n);  // in floats
  return (panels > band ? panels : band) + 256;
}

}  // namespace rmsgd

// reduce_to_band: gram, scale and matrix are those of tridiagonalise_f32 (tridiagonal_cpu.h), rows `stride`
// apart. The band is left at the beginning of work, in double.
// chase_bulges: makes that band tridiagonal. diagonal: n values, off_diagonal: n - 1 values.
RMSGD_EACH_ISA(void reduce_to_band_f32(const double* gram, double scale, int n, ptrdiff_t stride,
                                       float* matrix, float* work, const ThreadTeam& team);
               void reduce_to_band_f64(const double* gram, double scale, int n, ptrdiff_t stride,
                                       double* matrix, double* work, const ThreadTeam& team);
               void chase_bulges(double* band, int n, double* diagonal, double* off_diagonal,
                                 const ThreadTeam& team);)
