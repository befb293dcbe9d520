// Element types of weights, buffers and gradients.
#pragma once

#include <stdint.h>

namespace rmsgd {

enum class Dtype : uint8_t { float32, float64, float16, bfloat16 };

// Bytes of an element.
constexpr int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// Of the memory of past gradients that belongs to a weight.
constexpr Dtype buffer_dtype(Dtype weight) {
  return weight == Dtype::float64 ? Dtype::float64 : Dtype::float32;
}

}  // namespace rmsgd
