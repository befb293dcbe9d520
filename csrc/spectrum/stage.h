// What a Gram matrix of either precision can tell.
#pragma once

#include "../evbmf/metrics.h"

namespace rmsgd {

// Of a Gram matrix whose elements are of this type.
template <class T>
RMSGD_FN Stage stage_of() {
  return sizeof(T) == 4 ? STAGE_FP32 : STAGE_FP64;
}

// Unit roundoff of its elements.
RMSGD_FN double roundoff(Stage stage) { return stage == STAGE_FP32 ? 0x1p-24 : 0x1p-53; }

// How far an eigenvalue of a Gram matrix may be off, if `largest` is the largest.
RMSGD_FN double gram_error(Stage stage, double largest) { return 8.0 * roundoff(stage) * largest; }

// Whether a trace leaves room on both sides: nothing overflowed, and what underflowed does not matter. Zero
// and NaN leave none.
RMSGD_FN bool in_range(double trace, Stage stage) {
  return stage == STAGE_FP32 ? trace > 0x1p-60 && trace < 0x1p100 : trace > 0x1p-600 && trace < 0x1p900;
}

// A row of the smaller side counts as zero if its square, on the diagonal of a Gram matrix of this trace, is
// at or below this: all such rows together have a norm of M 2^-53 gamma_1 at most (trace <= L gamma_1^2), and
// as many singular values are numerically zero. None counts as zero where so much of an fp32 product may have
// vanished, M 2^-149 of a square, that it could matter.
RMSGD_FN double largest_zero_row(double L, double M, double trace, Stage stage) {
  if (stage == STAGE_FP32 && trace < 0x1p-28) return -1.0;
  return 0x1p-106 * trace * (M / L) * (M / L);
}

}  // namespace rmsgd
