// The learning-rate rules on a GPU: what the kernel is given.
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
