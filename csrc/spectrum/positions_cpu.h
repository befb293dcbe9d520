// Convolution kernels whose positions are measured as matrices: each is read once for all of them.
//
// A kernel (o, i, *k) is one o x i matrix for each position of k. Such matrices have the same sides, and
// their elements lie between each other's in memory, so that packing one of them touches the whole kernel.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "gram_cpu.h"
#include "memory_cpu.h"

namespace rmsgd {

// Finds the kernels among the matrices of a measurement, and packs each of them for products in fp32. The
// products are those of matrices that are packed one by one, bit for bit.
class Positions {
 public:
  // Bytes of all packed kernels at a time. Matrices that find no room are packed one by one.
  static constexpr std::size_t MOST_BYTES = std::size_t(1) << 26;

  // The positions of a kernel are found where they follow one another. Matrices of `most_rows` rows and more
  // are left out.
  Positions(const MatrixView* matrices, int count, std::int64_t most_rows)
      : kernel_of_(std::size_t(count), nullptr) {
    for (int first = 0, next; first < count; first = next) {
      for (next = first + 1; next < count && follows(matrices[next - 1], matrices[next]);) ++next;
      const MatrixView& matrix = matrices[first];
      const std::int64_t rows = matrix.small.length(), columns = matrix.large.length();
      if (next - first == 1 || matrix.dtype == Dtype::float64 || rows < 2 || rows >= most_rows) continue;
      if (!lie_between(matrix, next - first)) continue;
      const std::size_t bytes = packed_position_size(rows, columns) * (next - first) * sizeof(float);
      if (bytes > MOST_BYTES) continue;
      largest_ = std::max(largest_, bytes);
      kernels_.emplace_back(matrix, first, next - first);
      std::fill(kernel_of_.begin() + first, kernel_of_.begin() + next, &kernels_.back());
    }
    memory_.reserve(kernels_.size());  // nothing throws on a thread
    unused_.reserve(kernels_.size());
  }

  // The packed columns of a matrix, or null where it is to be packed by itself. All threads that come at a
  // time pack together. To be followed by done().
  const float* packed(int matrix) {
    Kernel* const kernel = kernel_of_[matrix];
    if (kernel == nullptr) return nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!kernel->begun) kernel->memory = take();
      kernel->begun = true;
    }
    if (kernel->memory == nullptr) return nullptr;
    const std::int64_t rows = kernel->all.small.length();
    for (std::int64_t row;
         (row = kernel->next_row.fetch_add(PACKED_ROWS, std::memory_order_relaxed)) < rows;) {
      RMSGD_DISPATCH(pack_positions)(kernel->all, kernel->positions, row, kernel->memory);
      kernel->packed_rows.fetch_add(PACKED_ROWS, std::memory_order_release);
    }
    while (kernel->packed_rows.load(std::memory_order_acquire) < rows) sched_yield();
    const std::int64_t columns = kernel->all.large.length() / kernel->positions;
    return kernel->memory + (matrix - kernel->first) * packed_position_size(rows, columns);
  }

  void done(int matrix) {
    Kernel* const kernel = kernel_of_[matrix];
    if (kernel == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--kernel->left == 0 && kernel->memory != nullptr) unused_.push_back(kernel->memory);
  }

 private:
  struct Kernel {
    Kernel(const MatrixView& matrix, int first, int positions)
        : all(matrix), first(first), positions(positions), left(positions) {
      all.large.size[3] = positions;
      all.large.stride[3] = 1;
    }

    MatrixView all;  // the columns of all positions, those with the same number side by side
    int first, positions, left;
    bool begun = false;
    float* memory = nullptr;
    std::atomic<std::int64_t> next_row{0}, packed_rows{0};
  };

  // Whether a matrix has the sides of the one before, and each of its elements is the next one in memory.
  static bool follows(const MatrixView& before, const MatrixView& matrix) {
    return before.dtype == matrix.dtype && same(before.small, matrix.small) &&
           same(before.large, matrix.large) &&
           static_cast<const char*>(before.data) + size_of(before.dtype) == matrix.data;
  }

  static bool same(const Side& a, const Side& b) {
    return std::equal(a.size, a.size + 4, b.size) && std::equal(a.stride, a.stride + 4, b.stride);
  }

  // Whether so many positions fit between neighbouring elements of a matrix, so that they are the innermost
  // dimension. With channels last they do not, and the matrices are packed fast one by one.
  static bool lie_between(const MatrixView& matrix, int positions) {
    for (const Side* side : {&matrix.small, &matrix.large}) {
      for (int d = 0; d < 4; ++d) {
        if (side->size[d] > 1 && side->stride[d] != 0 && side->stride[d] < positions) return false;
      }
    }
    return matrix.large.size[3] == 1;  // there is room for that dimension
  }

  // Memory for any of the kernels, or null.
  float* take() {
    if (!unused_.empty()) {
      float* const memory = unused_.back();
      unused_.pop_back();
      return memory;
    }
    if ((memory_.size() + 1) * largest_ > MOST_BYTES) return nullptr;
    Memory<float> memory = allocate<float>(largest_);
    if (memory == nullptr) return nullptr;
    memory_.push_back(std::move(memory));
    return memory_.back().get();
  }

  std::deque<Kernel> kernels_;
  std::vector<Kernel*> kernel_of_;
  std::size_t largest_ = 0;
  std::mutex mutex_;
  std::vector<Memory<float>> memory_;
  std::vector<float*> unused_;
};

}  // namespace rmsgd
