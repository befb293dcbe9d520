// The epoch end on a GPU: from the weights of a network to the EVBMF metrics of every matrix.
//
// Each stage is a kernel over all matrices, and none needs the host:
//
//   fingerprint        caller's stream   a sum that tells weights from others
//   gram, gram_sum     caller's stream   fp32 Gram matrices
//   tridiagonal        side stream       teams of blocks, launched cooperatively
//   measure            side stream       eigenvalues, EVBMF, row of the table: a block per matrix
//
// then gram, tridiagonal and measure once more in fp64, and svd, one team of blocks launched cooperatively:
// the singular values of what even that does not decide. A matrix says in its state which stage it waits for;
// blocks that find it waiting for another leave at once.
//
// The later stages read the weights again, beside what the caller does meanwhile. The fingerprint tells them
// whether these are still the same; otherwise the row says CHANGED. It costs one more look at the weights of
// every matrix, counted .1 ms for ResNet50 on an H100-class card and .5 ms on sm_75.
#pragma once

#include "../evbmf/metrics.h"
#include "gram_cuda.h"

namespace rmsgd {

struct GridBarrier;

struct SpectrumState {
  unsigned long long fingerprint;  // of the weights
  double trace;                    // of the Gram matrix, scaled by 2^exponent
  int exponent;
  int nonzero_rows;  // of the weight, see largest_zero_row
  Stage stage;
  int unused;
};

// A block of the tridiagonal reduction.
struct TeamBlock {
  int matrix;
  int block;
};

// Arguments of all stages.
struct SpectrumArguments {
  const CudaMatrix* matrix;
  const GramItem* item;    // of this launch, one per block (gram, gram_sum)
  const TeamBlock* block;  // of this launch, one per block (tridiagonal)
  unsigned char* workspace;
  SpectrumState* state;       // (matrices)
  GridBarrier* grid_barrier;  // (2 matrices + 1): of the reductions in fp32 and in fp64, and of svd
  double* table;              // (matrices, METRICS_FIELDS)
  const int* row;             // (matrices) a matrix's row of the table
  double* svd_scratch;        // (singular_values_scratch + L) doubles, then counts; one matrix at a time
  int matrices;
  int shared_bytes;  // of a block of the tridiagonal reduction
  int svd_blocks;
  int unused;
};

// One matrix whose values are known. values: (L), descending: eigenvalues of the Gram matrix, or
// singular values. scratch: 2 L + 2 doubles.
struct ValuesArguments {
  const double* values;
  double* scratch;
  double* row;
  double M;
  int L;
  int singular;
};

}  // namespace rmsgd
