// Enough of CUDA's language to compile the kernels' sources for the CPU: every thread is a fiber.
#pragma once

#include <algorithm>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __forceinline__ inline

struct Dim3 {
  unsigned x, y, z;
};

inline Dim3 threadIdx, blockIdx, blockDim;

namespace emulator {

struct Warp {
  Meeting meeting;
  double values[32];
};

struct Grid {
  Fibers* fibers;
  std::vector<Meeting> blocks;
  std::vector<Warp> warps;
  int threads;
};

inline Grid* grid;

inline int thread() { return grid->fibers->current(); }
inline Warp& warp() { return grid->warps[thread() / 32]; }

}  // namespace emulator

inline void __syncthreads() {
  emulator::grid->fibers->wait(emulator::grid->blocks[emulator::thread() / emulator::grid->threads]);
}
inline void __syncwarp() { emulator::grid->fibers->wait(emulator::warp().meeting); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline void __nanosleep(unsigned) { emulator::grid->fibers->yield(); }

template <class T>
T atomicAdd(T* to, T x) {
  emulator::grid->fibers->note_progress();
  const T old = *to;
  *to += x;
  return old;
}

template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&emulator::warp().values[emulator::thread() % 32], &x, sizeof x);
  __syncwarp();
  std::memcpy(&x, &emulator::warp().values[emulator::thread() % 32 ^ lanes], sizeof x);
  __syncwarp();
  return x;
}
