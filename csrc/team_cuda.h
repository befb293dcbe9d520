// Teams of CUDA threads: a warp, a block, and several blocks that meet through global memory.
//
// Blocks of a cluster (sm_90 and newer) could meet through distributed shared memory instead. They do not:
// sm_75 to sm_89 have no clusters, so that it would be a second kind of team with a launch of its own, and
// at most 8 blocks of a portable cluster could work on a matrix, where teams of up to 32 pay.
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

// The sum is rounded by itself. If it were fused with the product that `a` is on one lane alone, the lanes
// would have different bits.
template <class T>
__device__ __forceinline__ T sum_of(T a, T b) {
  return a + b;
}
__device__ __forceinline__ float sum_of(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double sum_of(double a, double b) { return __dadd_rn(a, b); }

// The operation of a collective on two values, and a value that changes nothing beside `x`.
template <class T>
struct Sum {
  __device__ __forceinline__ T operator()(T a, T b) const { return sum_of(a, b); }
  __device__ __forceinline__ T neutral(T) const { return T(0); }
};

template <class T>
struct Max {
  __device__ __forceinline__ T operator()(T a, T b) const { return a > b ? a : b; }
  __device__ __forceinline__ T neutral(T x) const { return x; }
};

// Combines the warp's values in a butterfly, so that every lane ends with the same bits.
template <class Operation, class T>
__device__ __forceinline__ T combine_warp(Operation operation, T x) {
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
    x = operation(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  }
  return x;
}

// A value of up to 8 bytes as bits, and back.
template <class T>
__device__ __forceinline__ unsigned long long bits_of(T x) {
  unsigned long long bits = 0;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

template <class T>
__device__ __forceinline__ T of_bits(unsigned long long bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
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

  template <class Operation, class T>
  __device__ __forceinline__ T combine(Operation operation, T x) {
    x = combine_warp(operation, x);
    T* const row = next_row<T>();
    const int lane = int(threadIdx.x) % WARP;
    if (lane == 0) row[threadIdx.x / WARP] = x;
    __syncthreads();
    return combine_warp(operation, lane < int(blockDim.x) / WARP ? row[lane] : operation.neutral(row[0]));
  }

  // The first member's value.
  template <class T>
  __device__ __forceinline__ T first(T x) {
    T* const row = next_row<T>();
    if (rank() == 0) *row = x;
    __syncthreads();
    return *row;
  }

 private:
  // Values pass through one of two rows in turn: whoever writes a row again has passed the barrier of
  // the collective between, which nobody reaches before having read this row.
  template <class T>
  __device__ __forceinline__ T* next_row() {
    turn_ = 1 - turn_;
    return reinterpret_cast<T*>(shared_memory() + turn_ * WARP * 8);
  }

  int turn_ = 0;
};

// The place in global memory where the blocks of one team wait for each other. It is zero at first and serves
// one launch. A block comes to each of its barriers with a value, which is stored in two halves. The
// barrier's number stands above the lower half.
struct GridBarrier {
  unsigned long long halves[2][2][WARP];
};
static_assert(sizeof(GridBarrier) == 1024, "_GRID_BARRIER_BYTES of rmsgd/backends/cuda_spectra.py");

// A thread that finds with load_relaxed the word of another's store_release, and then passes fence_acquire,
// sees all that the other had written or seen before. These are PTX's, since NVRTC has no cuda::atomic_ref
// without the headers of the toolkit. Waiting takes many loads and one fence, because a load that acquires
// would empty the multiprocessor's first-level cache each time.
__device__ __forceinline__ void store_release(unsigned long long* to, unsigned long long word) {
#ifdef __CUDA_ARCH__
  asm volatile("st.release.gpu.u64 [%0], %1;" : : "l"(to), "l"(word) : "memory");
#else
  __atomic_store_n(to, word, __ATOMIC_RELEASE);
#endif
}

__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* from) {
#ifdef __CUDA_ARCH__
  unsigned long long word;
  asm volatile("ld.relaxed.gpu.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
#else
  return __atomic_load_n(from, __ATOMIC_RELAXED);
#endif
}

__device__ __forceinline__ void fence_acquire() {
#ifdef __CUDA_ARCH__
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
#else
  __atomic_thread_fence(__ATOMIC_ACQUIRE);
#endif
}

// A team of up to 32 blocks. All of them must be resident at once, so that the launch must be cooperative.
class GridTeam {
 public:
  __device__ __forceinline__ GridTeam(int block, int blocks, GridBarrier* grid_barrier)
      : block_number_(block), blocks_(blocks), grid_barrier_(grid_barrier) {}

  __device__ __forceinline__ int rank() const { return block_number_ * block_.size() + block_.rank(); }
  __device__ __forceinline__ int size() const { return blocks_ * block_.size(); }
  __device__ __forceinline__ BlockTeam& block() { return block_; }
  __device__ __forceinline__ int block_number() const { return block_number_; }
  __device__ __forceinline__ int blocks() const { return blocks_; }

  // Neighbouring groups are warps of different blocks: a few groups at work have many multiprocessors.
  __device__ __forceinline__ WarpTeam group() const { return {}; }
  __device__ __forceinline__ int groups() const { return size() / WARP; }
  __device__ __forceinline__ int group_number() const {
    return block_.rank() / WARP * blocks_ + block_number_;
  }

  __device__ __forceinline__ void barrier() {
    block_.barrier();
    if (blocks_ == 1) return;
    exchange(Sum<int>(), 0);
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
  template <class Operation, class T>
  __device__ __forceinline__ T combine(Operation operation, T x) {
    x = block_.combine(operation, x);
    return blocks_ == 1 ? x : block_.first(exchange(operation, x));
  }

  // The barrier of the blocks, for blocks whose own threads have met. The first warp of each goes there, with
  // one lane to look out for each block, and comes back with all values combined.
  template <class Operation, class T>
  __device__ __forceinline__ T exchange(Operation operation, T x) {
    ++passed_;
    if (block_.rank() >= WARP) return x;
    const int lane = block_.rank();
    // A block may have come to the next barrier already, but to none after it.
    unsigned long long* const low = grid_barrier_->halves[passed_ % 2][0];
    unsigned long long* const high = grid_barrier_->halves[passed_ % 2][1];
    const unsigned long long number = (unsigned long long)passed_ << 32;
    if (lane == 0) {
      const unsigned long long bits = bits_of(x);
      if (sizeof(T) > 4) high[block_number_] = bits >> 32;
      store_release(&low[block_number_], number | (bits & 0xffffffffu));
    }
    unsigned long long bits = 0;
    if (lane < blocks_) {
      while ((bits = load_relaxed(&low[lane])) < number) __nanosleep(20);
      fence_acquire();
      bits &= 0xffffffffu;
      if (sizeof(T) > 4) bits |= high[lane] << 32;
    }
    return combine_warp(operation, lane < blocks_ ? of_bits<T>(bits) : operation.neutral(x));
  }

  BlockTeam block_;
  int block_number_;
  int blocks_;
  unsigned passed_ = 0;
  GridBarrier* grid_barrier_;
};

}  // namespace rmsgd
