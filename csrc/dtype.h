// Element types of weights, buffers and gradients.
#pragma once

#include "team.h"

namespace rmsgd {

enum class Dtype : int { float32, float64, float16, bfloat16 };  // as DTYPES of rmsgd/backends/kernels.py

// Bytes of an element.
RMSGD_FN constexpr int size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Of the memory of past gradients that belongs to a weight.
RMSGD_FN constexpr Dtype buffer_dtype(Dtype weight) {
  return weight == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

}  // namespace rmsgd
