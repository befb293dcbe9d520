// Element types of weights, buffers and gradients.
#pragma once

#include <stdint.h>

namespace rmsgd {

enum class Dtype : uint8_t { float32, float64, float16, bfloat16 };

}  // namespace rmsgd
