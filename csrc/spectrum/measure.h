// The epoch end on CPUs: from the weights of a network to the EVBMF metrics of every matrix.
//
// Every part is a kernel of our own; `python -m bench spectrum` times each, size by size, beside what could
// be called instead. On one core of an AMD Zen 3, fp32, the symmetric product took .5 to .7 of the time of
// torch.mm's whole one (L = 64 to 512), and tridiagonal form and eigenvalues .3 to .8 of that of
// torch.linalg.eigvalsh (L = 16 to 128).
// EVBMF is below 5 % of the spectrum at L = 16, 0.5 % at 128.
#pragma once

#include "../evbmf/metrics.h"
#include "../matrix.h"

namespace rmsgd {

// What the time of a measurement goes to.
enum MeasurePart : int { GRAM, REDUCTION, EIGENVALUES, EVBMF, MEASURE_PARTS };

// Measures `count` matrices on `threads` threads; row i of `out` holds the MetricsField values of matrix i.
// Where singular values from a Gram matrix cannot decide, STATUS is NEEDS_SVD and the rest of the row is
// what the fp64 Gram matrix gave. The result does not depend on the number of threads. Matrices without
// elements have rank 0. Throws std::bad_alloc.
// seconds: null, or room for MEASURE_PARTS: the time each part took, the sum over the matrices.
void measure(const MatrixView* matrices, int count, int threads, double* out, double* seconds = nullptr);

}  // namespace rmsgd
