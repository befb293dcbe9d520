// The epoch end on CPUs: from the weights of a network to the EVBMF metrics of every matrix.
#pragma once

#include "../evbmf/metrics.h"
#include "../matrix.h"

namespace rmsgd {

// Measures `count` matrices on `threads` threads; row i of `out` holds the MetricsField values of matrix i.
// Where singular values from a Gram matrix cannot decide, STATUS is NEEDS_SVD and the rest of the row is
// what the fp64 Gram matrix gave. The result does not depend on the number of threads. Matrices without
// elements have rank 0. Throws std::bad_alloc.
void measure(const MatrixView* matrices, int count, int threads, double* out);

// Eigenvalues of A A^T, descending, from a Gram matrix in fp32 or in fp64: as many as A has rows. NaN where A
// is not finite. Throws std::bad_alloc.
void gram_eigenvalues(const MatrixView& matrix, bool double_precision, int threads, double* out);

}  // namespace rmsgd
