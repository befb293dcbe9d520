// Reduction of a symmetric matrix to tridiagonal form, keeping its eigenvalues.
#pragma once

#include <stddef.h>

#include "../isa.h"
#include "band_cpu.h"
#include "thread_team.h"

namespace rmsgd {

// So many Householder reflections are gathered into one update of the rest of the matrix.
constexpr int PANEL = 8;

// A matrix-vector product has so many parts, which are summed in a fixed order, so that the result does not
// depend on the number of threads. A matrix that one thread reduces alone needs one part.
constexpr int PRODUCT_PARTS = 16;
RMSGD_FN int product_parts(ptrdiff_t n) { return n < 1024 ? 1 : PRODUCT_PARTS; }

// From so many bytes of the matrix on, from 1024 rows in fp64 and 1449 in fp32, it is reduced to a band first
// (band_cpu.h). Below, it stays in the cache, and the second stage costs more than the first one wins. On one
// core of an Intel Xeon with 2 MB of second-level cache the reduction to a band and on takes
//
//   rows   fp32   fp64
//    512   3.31   2.10   times as long as the one here
//   1024   1.49    .85
//   2048    .60    .56
constexpr ptrdiff_t BANDED_BYTES = ptrdiff_t(1) << 23;
RMSGD_FN bool is_banded(ptrdiff_t n, ptrdiff_t element_bytes) {
  return n * n * element_bytes >= BANDED_BYTES;
}

// Leading dimension of the matrix, and elements of the workspace. Rows a multiple of 1 KiB apart would
// compete for the same few lines of the cache.
RMSGD_FN ptrdiff_t tridiagonal_stride(ptrdiff_t n) {
  const ptrdiff_t whole = (n + 15) / 16 * 16;
  return whole % 128 == 0 ? whole + 16 : whole;
}
RMSGD_FN ptrdiff_t tridiagonal_work_size(ptrdiff_t n) {
  const ptrdiff_t stride = tridiagonal_stride(n);
  const ptrdiff_t rows = stride * (3 * PANEL + 1 + product_parts(n)) + 16;
  const ptrdiff_t band = is_banded(n, sizeof(double)) ? band_work_size(n, stride) : 0;
  return rows > band ? rows : band;
}

}  // namespace rmsgd

// gram: the symmetric n x n matrix, rows tridiagonal_stride(n) apart, n rounded up to 16 of them, as gram_f32
// or gram_f64 leave it. What is reduced is scale * gram; its norm should be about 1.
// matrix: the same storage in the precision of the reduction, destroyed; may be gram itself.
// diagonal: n values, off_diagonal: n - 1 values.
RMSGD_EACH_ISA(void tridiagonalise_f32(const double* gram, double scale, int n, float* matrix,
                                       double* diagonal, double* off_diagonal, float* work,
                                       const ThreadTeam& team);
               void tridiagonalise_f64(const double* gram, double scale, int n, double* matrix,
                                       double* diagonal, double* off_diagonal, double* work,
                                       const ThreadTeam& team);)
