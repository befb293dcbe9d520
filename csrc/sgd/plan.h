// The whole network's step on CPU threads: its parameters are cut once into shares of equal work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "step.h"

namespace rmsgd {

class StepPlan {
 public:
  // Gradients are set before each step. A tensor's group is an index into step's `groups`. Throws
  // std::invalid_argument if two weights or buffers share memory, which several threads would write.
  explicit StepPlan(std::vector<StepTensor> tensors);

  std::vector<StepTensor>& tensors() { return tensors_; }

  // The number of groups that the tensors refer to, one more than the largest index.
  std::size_t groups() const { return groups_; }

  // Whether memory overlaps a weight or a buffer.
  bool writes(const void* memory, int64_t bytes) const;

  // Takes the step with the gradients that are set. Throws std::invalid_argument, before anything
  // is written, if a gradient needs a buffer that does not exist.
  void step(const std::vector<StepGroup>& groups, double grad_scale, int threads);

  bool busy = false;  // a caller is taking a step

 private:
  struct Extent {
    const char* begin;
    const char* end;
    std::size_t tensor;
  };

  std::vector<StepTensor> tensors_;
  std::vector<Extent> written_;  // by address
  std::size_t groups_ = 0;
  std::vector<StepPiece> pieces_;
  std::vector<int64_t> shares_;  // share k is pieces [shares_[k], shares_[k + 1])
};

}  // namespace rmsgd
