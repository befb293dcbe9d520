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

// Whether a trace leaves room on both sides: nothing overflowed, and what underflowed does not matter. Zero
// and NaN leave none.
RMSGD_FN bool in_range(double trace, Stage stage) {
  return stage == STAGE_FP32 ? trace > 0x1p-60 && trace < 0x1p100 : trace > 0x1p-600 && trace < 0x1p900;
}

}  // namespace rmsgd
