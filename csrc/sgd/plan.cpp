#include "plan.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "../parallel.h"

namespace rmsgd {
namespace {

// A thread takes one share at a time. There are some hundreds of shares, so that the last one finishes soon
// after the others on any number of threads. A share has at least ten microseconds of work, so that taking
// one costs almost nothing, and more in large networks, since memory is read faster in long runs (16384
// elements: 3 % slower).
constexpr int64_t SHARES = 256, SHORTEST = 16384, LONGEST = 262144;

// A cut keeps the alignment of the parameter.
constexpr int64_t ALIGN = 64;

// The cost of one more tensor, in elements, since thousands of tiny ones are work too.
constexpr int64_t PIECE_COST = 64;

// The number of elements in a share, which does not depend on the number of threads.
int64_t share_size(const std::vector<StepTensor>& tensors) {
  int64_t elements = 0;
  for (const StepTensor& tensor : tensors) elements += tensor.numel;
  return std::clamp(elements / SHARES, SHORTEST, LONGEST);
}

}  // namespace

StepPlan::StepPlan(std::vector<StepTensor> tensors) : tensors_(std::move(tensors)) {
  for (std::size_t k = 0; k < tensors_.size(); ++k) {
    const StepTensor& tensor = tensors_[k];
    if (tensor.numel == 0) continue;
    const char* const weight = static_cast<const char*>(tensor.weight);
    const char* const buffer = static_cast<const char*>(tensor.buffer);
    written_.push_back({weight, weight + tensor.numel * size_of(tensor.dtype), k});
    if (buffer != nullptr) {
      written_.push_back({buffer, buffer + tensor.numel * size_of(buffer_dtype(tensor.dtype)), k});
    }
  }
  std::sort(written_.begin(), written_.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (std::size_t i = 1; i < written_.size(); ++i) {
    if (written_[i].begin >= written_[i - 1].end) continue;
    const auto [first, second] = std::minmax(written_[i - 1].tensor, written_[i].tensor);
    throw std::invalid_argument("parameters: " + std::to_string(first) + " and " + std::to_string(second) +
                                " or their buffers share memory");
  }

  shares_.push_back(0);
  const int64_t share = share_size(tensors_);
  int64_t room = share;
  for (std::size_t k = 0; k < tensors_.size(); ++k) {
    groups_ = std::max(groups_, std::size_t(tensors_[k].group) + 1);
    for (int64_t begin = 0; begin < tensors_[k].numel;) {
      const int64_t end = std::min(tensors_[k].numel, begin + (room + ALIGN - 1) / ALIGN * ALIGN);
      pieces_.push_back({begin, end, int32_t(k)});
      room -= end - begin + PIECE_COST;
      begin = end;
      if (room <= 0) {
        shares_.push_back(int64_t(pieces_.size()));
        room = share;
      }
    }
  }
  if (shares_.back() != int64_t(pieces_.size())) shares_.push_back(int64_t(pieces_.size()));
}

bool StepPlan::writes(const void* memory, int64_t bytes) const {
  const char* const begin = static_cast<const char*>(memory);
  const auto after = std::partition_point(written_.begin(), written_.end(),
                                          [&](const Extent& extent) { return extent.end <= begin; });
  return bytes > 0 && after != written_.end() && after->begin < begin + bytes;
}

void StepPlan::step(const std::vector<StepGroup>& groups, double grad_scale, int threads) {
  for (std::size_t k = 0; k < tensors_.size(); ++k) {
    const StepTensor& tensor = tensors_[k];
    if (tensor.gradient == nullptr) continue;
    if (groups[tensor.group].momentum != 0 && tensor.buffer == nullptr) {
      throw std::invalid_argument("parameter " + std::to_string(k) + " has no buffer, but momentum is " +
                                  std::to_string(groups[tensor.group].momentum));
    }
  }

  const auto step_pieces = RMSGD_DISPATCH(step_pieces);
  const int64_t shares = int64_t(shares_.size()) - 1;
  std::atomic<int64_t> next{0};
  parallel(threads, shares, [&](int, int) {
    for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < shares;) {
      step_pieces(pieces_.data() + shares_[k], shares_[k + 1] - shares_[k], tensors_.data(), groups.data(),
                  grad_scale);
    }
  });

  for (StepTensor& tensor : tensors_) {
    if (tensor.gradient != nullptr && groups[tensor.group].momentum != 0) *tensor.fresh = false;
  }
}

}  // namespace rmsgd
