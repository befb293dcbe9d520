// The learning-rate rules on a GPU: the argument of the kernel.
#pragma once

#include "rates.h"

namespace rmsgd {

struct RatesArguments {
  RateTables tables;
  const double* metrics;
  double* measured;  // scratch, (layers)
  int* held;         // scratch, (layers)
};

}  // namespace rmsgd
