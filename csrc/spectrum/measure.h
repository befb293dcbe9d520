// The epoch end on CPUs: from the weights of a network to the EVBMF metrics of every matrix.
//
// Every part is a kernel of our own; `python -m bench spectrum` times each, size by size, beside what could
// be called instead (bench/results/spectrum-cpu.json). On two cores of an AMD Zen 3, for n x 2n matrices of
// n = 64 to 1024, torch.mm's whole product takes 1.1 to 1.9 times as long as our symmetric one, and
// torch.linalg.eigvalsh 2.4 to 7 times as long as tridiagonal form and eigenvalues. At n = 16 and 32 ours
// loses up to a fifth on the product, which is a fifth or less of the time there. EVBMF is 5 % at n = 16 and
// 1 % from 64 on.
#pragma once

#include "../evbmf/metrics.h"
#include "../matrix.h"

namespace rmsgd {

// What the time of a measurement goes to.
enum MeasurePart : int { GRAM, REDUCTION, EIGENVALUES, EVBMF, MEASURE_PARTS };

// Singular values that are wanted beside the metrics. They come from a Gram matrix: lambda = gamma^2 is
// within 16 u lambda_1 of itself (half of it the search's), and 0 where it is below 8 u lambda_1. Where a
// large matrix is reduced by way of a band, band_error in stage.h takes the place of 8 u lambda_1 if it is
// more.
enum WantedValues : int {
  NO_VALUES,
  KEPT_VALUES,  // those above the noise threshold, as many as the rank
  HALF_VALUES,  // all, of which the larger half is known to three digits or u is 2^-53
  // The same without the metrics, which may need a product in fp64 where the values do not. With u 2^-24 the
  // search adds up to HALF_ERROR / 10 of a value to its error, and one not known to three digits is 0.
  BULK_VALUES,
  ALL_VALUES,  // all, u = 2^-53
};

// A value of the larger half is known to three digits where the bound of its error is below this share of it.
constexpr double HALF_ERROR = 1e-3;

// Measures `count` matrices on `threads` threads; row i of `out` holds the MetricsField values of matrix i.
// Where singular values from a Gram matrix cannot decide, STATUS is NEEDS_SVD and the rest of the row is
// what the fp64 Gram matrix gave. The result does not depend on the number of threads. Matrices without
// elements have rank 0. Throws std::bad_alloc.
// seconds: null, or room for MEASURE_PARTS: the time each part took, the sum over the matrices.
// values: null, or for each matrix room for the values of its smaller side, descending, in units of the
// weight; what is not wanted is 0. They mean nothing where STATUS is not MEASURED.
void measure(const MatrixView* matrices, int count, int threads, double* out, double* seconds = nullptr,
             WantedValues wanted = NO_VALUES, double* const* values = nullptr);

}  // namespace rmsgd
