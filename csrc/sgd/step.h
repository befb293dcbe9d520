// What the step kernels are given: plain pointers, sizes and numbers.
#pragma once

#include <stdint.h>

#include "../dtype.h"
#include "../isa.h"

namespace rmsgd {

// Hyper-parameters that parameters share. A parameter's learning rate is multiplier * eta.
struct StepGroup {
  double multiplier;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
  bool velocity;  // memory as the paper's velocity, else as torch's momentum buffer
};

// One parameter. The parameter, its buffer and its gradient have the same strides and fill their
// memory without gaps, so that element i of one belongs to element i of the others.
struct StepTensor {
  void* weight;
  void* buffer;          // float64 for a float64 weight, else float32; null if there is none
  const void* gradient;  // null if there is none this time
  const double* eta;
  int64_t numel;
  int32_t group;
  Dtype dtype;
  Dtype gradient_dtype;
  bool* fresh;  // true until a gradient has entered the buffer, which then counts as zero
};

// Elements [begin, end) of one parameter.
struct StepPiece {
  int64_t begin;
  int64_t end;
  int32_t tensor;
};

}  // namespace rmsgd

// Takes the step on `count` pieces. A gradient is divided by grad_scale.
RMSGD_EACH_ISA(void step_pieces(const StepPiece* pieces, int64_t count, const StepTensor* tensors,
                                const StepGroup* groups, double grad_scale);)
