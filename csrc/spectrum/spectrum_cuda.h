// The epoch end on a GPU: from the weights of a network to the EVBMF metrics of every matrix.
//
// Each stage is a kernel over all matrices, and none needs the host:
//
//   fingerprint        caller's stream   a sum that tells weights from others
//   gram, gram_sum     caller's stream   fp32 Gram matrices
//   tridiagonal        side stream       teams of blocks, launched cooperatively
//   sturm              side stream       eigenvalues, STURM_PART of them to a block
//   measure            side stream       EVBMF, row of the table: a block per matrix
//
// then gram, tridiagonal, sturm and measure once more in fp64, and svd, one team of blocks launched
// cooperatively: the singular values of what even that does not decide. A matrix says in its state which
// stage it waits for; blocks that find it waiting for another leave at once.
//
// The workspace has room for all matrices in fp32. What comes after that uses it anew: in fp64 as many
// matrices at a time as there is room for, in two or three rounds, and then the SVD.
//
// The later stages read the weights again, beside what the caller does meanwhile. The fingerprint tells them
// whether these are still the same; otherwise the row says CHANGED. It costs one more look at the weights of
// every matrix.
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

// Where a reduction has what, in elements of its type from `vectors` on.
struct ReductionVectors {
  int exchanged, tridiagonal, values;
  int rows;     // of all blocks, unless they are in shared memory
  int scratch;  // of measure

  RMSGD_FN ReductionVectors(int stride, int blocks, bool near_rows)
      : exchanged(0),
        tridiagonal(4 * stride),
        values(7 * stride),
        rows(8 * stride),
        scratch(8 * stride + (near_rows ? 0 : 4 * stride * blocks)) {}
};

// A block of the tridiagonal reduction, or the number of a part of the values.
struct TeamBlock {
  int matrix;
  int block;
};

// Arguments of all stages.
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

// One matrix whose values are known. values: (L), descending: eigenvalues of the Gram matrix, or
// singular values, those that are zero set to 0. rounding: of the weight, see rounding_of, for eigenvalues.
// scratch: 2 L + 2 doubles.
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
