// The epoch end on a GPU: from the weights of a network to the EVBMF metrics of every matrix.
//
// Each stage is a kernel over all matrices, and none needs the host:
//
//   gram, gram_sum     caller's stream   Gram matrices in fp32, and the weights' fingerprints
//   tridiagonal        side stream       teams of blocks, launched cooperatively
//   sturm              side stream       eigenvalues; a block finds STURM_PART of them
//   measure            side stream       EVBMF and the row of the table; a block per matrix
//
// Then gram, tridiagonal, sturm and measure follow once more in fp64. The last stage is svd, one team of
// blocks that is launched cooperatively: it finds the singular values of what even fp64 does not decide. The
// state of a matrix says which stage it waits for, and blocks that find it waiting for another leave at once.
//
// The workspace has room for all matrices in fp32. The later stages use it anew: first in fp64 for as many
// matrices at a time as there is room for, in two or three rounds, and then for the SVD.
//
// The later stages read the weights again, while the caller's work goes on. The fingerprint, a sum over the
// bits of all elements, tells them whether the weights are still the same. If not, the row says CHANGED. The
// fp32 kernel takes it from the elements that it loads in any case.
#pragma once

#include "../evbmf/metrics.h"
#include "gram_cuda.h"

namespace rmsgd {

struct GridBarrier;

struct SpectrumState {
  unsigned long long fingerprint;  // of the weights
  double trace;                    // of the Gram matrix, scaled by 2^exponent
  double lower, s_limit, upper;    // of its eigenvalues, see SpectrumBounds
  int needed, nonzero;
  int exponent;
  int nonzero_rows;  // of the weight, see largest_zero_row
  Stage stage;
  int unused;
};

// The places of a reduction's vectors, in elements of its type from `vectors` on.
struct ReductionVectors {
  int exchanged, tridiagonal, values;
  int rows;     // those of all blocks, unless they are in shared memory
  int scratch;  // that of the kernel `measure`

  RMSGD_FN ReductionVectors(int stride, int blocks, bool near_rows)
      : exchanged(0),
        tridiagonal(4 * stride),
        values(7 * stride),
        rows(8 * stride),
        scratch(8 * stride + (near_rows ? 0 : 4 * stride * blocks)) {}
};

// One block of a reduction, or one part of the eigenvalues of a matrix.
struct TeamBlock {
  int matrix;
  int block;
};

// The arguments of all stages.
struct SpectrumArguments {
  const CudaMatrix* matrix;
  const GramItem* item;    // of this launch, one per block (gram, gram_sum)
  const TeamBlock* block;  // of this launch, one per block (tridiagonal, sturm)
  unsigned char* workspace;
  SpectrumState* state;       // (matrices)
  GridBarrier* grid_barrier;  // (2 matrices + 1): of the reductions in fp32 and in fp64, and of svd
  double* table;              // (matrices, METRICS_FIELDS)
  const int* row;             // (matrices) a matrix's row of the table
  int matrices;
  int first;  // matrix of this launch (measure)
  int svd_blocks;
  int unused;
};

// One matrix whose values are known. `values` (L) are in descending order: the eigenvalues of the Gram
// matrix, or the singular values, of which those that count as zero are 0. `rounding` is the weight's, see
// rounding_of, and is used for eigenvalues alone. `scratch` has 2 L + 2 doubles.
struct ValuesArguments {
  const double* values;
  double* scratch;
  double* row;
  double M;
  double rounding;
  int L;
  int singular;
};

}  // namespace rmsgd
