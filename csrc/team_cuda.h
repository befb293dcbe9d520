// Teams of CUDA threads: a warp, a block, and several blocks that meet through global memory.
#pragma once

#include "team.h"

namespace rmsgd {

constexpr int WARP = 32;

// The dynamic shared memory of a block. Its first TEAM_SHARED bytes belong to the block's team.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  return dynamic_shared;
}

constexpr int TEAM_SHARED = 2 * WARP * 8;

// What a collective does with two values, and a value that changes nothing beside `x`.
template <class T>
struct Sum {
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
  __device__ __forceinline__ T neutral(T) const { return T(0); }
};

template <class T>
struct Max {
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
  __device__ __forceinline__ T neutral(T x) const { return x; }
};

// Combines the warp's values; a butterfly, so that every lane ends with the same bits.
template <class Operation, class T>
__device__ __forceinline__ T combine_warp(Operation operation, T x) {
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    x = operation(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}

class WarpTeam {
 public:
  __device__ __forceinline__ int rank() const { return int(threadIdx.x) % WARP; }
  __device__ __forceinline__ int size() const { return WARP; }
  __device__ __forceinline__ void barrier() const { __syncwarp(); }

  template <class T>
  __device__ __forceinline__ T sum(T x) const {
    __syncwarp();
    return combine_warp(Sum<T>(), x);
  }

  template <class T>
  __device__ __forceinline__ T max(T x) const {
    __syncwarp();
    return combine_warp(Max<T>(), x);
  }
};

// One block of whole warps.
class BlockTeam {
 public:
  __device__ __forceinline__ int rank() const { return int(threadIdx.x); }
  __device__ __forceinline__ int size() const { return int(blockDim.x); }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }

  template <class T>
  __device__ __forceinline__ T sum(T x) {
    return combine(Sum<T>(), x);
  }

  template <class T>
  __device__ __forceinline__ T max(T x) {
    return combine(Max<T>(), x);
  }

  // The warps' values pass through one of two rows in turn: whoever writes a row again has passed
  // the barrier of the collective between, which nobody reaches before having read this row.
  template <class Operation, class T>
  __device__ __forceinline__ T combine(Operation operation, T x) {
    x = combine_warp(operation, x);
    T* const row = reinterpret_cast<T*>(shared_memory() + turn_ * WARP * 8);
    turn_ = 1 - turn_;
    const int lane = int(threadIdx.x) % WARP;
    if (lane == 0) row[threadIdx.x / WARP] = x;
    __syncthreads();
    return combine_warp(operation, lane < int(blockDim.x) / WARP ? row[lane] : operation.neutral(row[0]));
  }

 private:
  int turn_ = 0;
};

// Where the blocks of one team meet, in global memory, zero before the first barrier.
struct Meeting {
  unsigned arrived;
  unsigned generation;
  double values[2][WARP];
};

// Up to 32 blocks. All of them must be resident at once: launch cooperatively.
class GridTeam {
 public:
  __device__ __forceinline__ GridTeam(int block, int blocks, Meeting* meeting)
      : block_number_(block), blocks_(blocks), meeting_(meeting) {}

  __device__ __forceinline__ int rank() const { return block_number_ * block_.size() + block_.rank(); }
  __device__ __forceinline__ int size() const { return blocks_ * block_.size(); }
  __device__ __forceinline__ BlockTeam& block() { return block_; }

  // Neighbouring groups are warps of different blocks: a few groups at work have many multiprocessors.
  __device__ __forceinline__ WarpTeam group() const { return {}; }
  __device__ __forceinline__ int groups() const { return size() / WARP; }
  __device__ __forceinline__ int group_number() const {
    return block_.rank() / WARP * blocks_ + block_number_;
  }

  __device__ __forceinline__ void barrier() const {
    block_.barrier();
    if (blocks_ == 1) return;
    if (block_.rank() == 0) {
      volatile unsigned* const generation = &meeting_->generation;
      const unsigned now = *generation;
      // Fences on both sides: before, so that the block's writes are seen; after, so that its reads
      // do not come from a first-level cache that is older than the others' writes.
      __threadfence();
      if (atomicAdd(&meeting_->arrived, 1u) == unsigned(blocks_) - 1) {
        meeting_->arrived = 0;
        __threadfence();
        *generation = now + 1;
      } else {
        while (*generation == now) __nanosleep(20);
      }
      __threadfence();
    }
    block_.barrier();
  }

  template <class T>
  __device__ __forceinline__ T sum(T x) {
    return combine(Sum<T>(), x);
  }

  template <class T>
  __device__ __forceinline__ T max(T x) {
    return combine(Max<T>(), x);
  }

 private:
  // As in a block, with rows in global memory.
  template <class Operation, class T>
  __device__ __forceinline__ T combine(Operation operation, T x) {
    x = block_.combine(operation, x);
    if (blocks_ == 1) return x;
    T* const row = reinterpret_cast<T*>(meeting_->values[turn_]);
    turn_ = 1 - turn_;
    if (block_.rank() == 0) row[block_number_] = x;
    barrier();
    const int lane = block_.rank() % WARP;
    return combine_warp(operation, lane < blocks_ ? row[lane] : operation.neutral(row[0]));
  }

  BlockTeam block_;
  int block_number_;
  int blocks_;
  int turn_ = 0;
  Meeting* meeting_;
};

}  // namespace rmsgd
