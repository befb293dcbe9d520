// The whole network's step on CPU threads: the parameters, cut once into equal work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "step.h"

namespace rmsgd {

class StepPlan {
 public:
  // Gradients are set before each step; the tensors' group is an index into step's `groups`.
  explicit StepPlan(std::vector<StepTensor> tensors);

  std::vector<StepTensor>& tensors() { return tensors_; }

  // How many groups the tensors refer to: one more than the largest index.
  std::size_t groups() const { return groups_; }

  // Takes the step with the gradients that are set. Throws std::invalid_argument, before anything
  // is written, if a gradient needs a buffer that is not there.
  void step(const std::vector<StepGroup>& groups, double grad_scale, int threads);

 private:
  std::vector<StepTensor> tensors_;
  std::size_t groups_ = 0;
  std::vector<StepPiece> pieces_;
  std::vector<int64_t> shares_;  // share k is pieces [shares_[k], shares_[k + 1])
};

}  // namespace rmsgd
