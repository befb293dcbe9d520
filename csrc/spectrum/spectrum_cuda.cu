// Entry points of the epoch end's spectra; spectrum_cuda.h says what follows what.
#include "../team_cuda.h"
#include "measure_tridiagonal.h"
#include "singular_values.h"
#include "spectrum_cuda.h"
#include "tridiagonal.h"

namespace rmsgd {
namespace {

// The next stage of a matrix that a Gram matrix of this type does not decide.
template <class T>
__device__ __forceinline__ Stage next_stage() {
  return sizeof(T) == 4 ? STAGE_FP64 : STAGE_SVD;
}

// What an element adds to the fingerprint of its matrix, which changes with any element.
__device__ __forceinline__ unsigned long long fingerprint_of(unsigned long long word) {
  const unsigned long long mixed = word * 0x9e3779b97f4a7c15ull;
  return mixed ^ mixed >> 32;
}
__device__ __forceinline__ unsigned long long fingerprint_of(float element) {
  return fingerprint_of(0ull + word_of_float(element));
}
__device__ __forceinline__ unsigned long long fingerprint_of(double element) {
  return fingerprint_of(word_of_double(element));
}

// One member's part of a sum that changes with any element of rows [top, bottom) and columns [begin, end).
struct Fingerprint {
  const CudaMatrix& matrix;
  int top, bottom;
  long long begin, end;
  int rank, members;

  template <class Element>
  __device__ __forceinline__ unsigned long long operator()(const Element* weight) const {
    const int innermost = int(matrix.small.size[3]);
    const long long step = matrix.small.stride[3];
    unsigned long long sum = 0;
    for (long long column = begin + rank; column < end; column += members) {
      const Element* const at = weight + offset_of(matrix.large, unsigned(column));
      // By runs of rows that are equally far apart: as a rule all of them.
      for (int row = top, run; row < bottom; row += run) {
        run = innermost - row % innermost;
        if (run > bottom - row) run = bottom - row;
        const Element* const from = at + offset_of(matrix.small, unsigned(row));
#pragma unroll 4
        for (int k = 0; k < run; ++k) sum += fingerprint_of(widen(from[k * step]));
      }
    }
    return sum;
  }
};

template <class Team>
__device__ __forceinline__ unsigned long long fingerprint(Team& team, const CudaMatrix& matrix, int top,
                                                          int bottom, long long begin, long long end) {
  return team.sum(with_elements(matrix.dtype, matrix.weight,
                                Fingerprint{matrix, top, bottom, begin, end, team.rank(), team.size()}));
}

// Adds to the matrix's fingerprint that of the rows of A that are an item's columns, over its part of A's
// columns.
__device__ __forceinline__ void take_fingerprint(const SpectrumArguments& arguments, const GramItem& item) {
  const CudaMatrix& matrix = arguments.matrix[item.matrix];
  BlockTeam team;
  const int top = item.column_tile * GRAM_TILE;
  const int bottom = top + GRAM_TILE < matrix.L ? top + GRAM_TILE : matrix.L;
  const ColumnPart part = column_part(matrix, matrix.splits, item.split);
  const unsigned long long sum = fingerprint(team, matrix, top, bottom, part.begin, part.end);
  if (team.rank() == 0) atomicAdd(&arguments.state[item.matrix].fingerprint, sum);
}

__device__ __forceinline__ double* row_of(const SpectrumArguments& arguments, int number) {
  return arguments.table + (long long)arguments.row[number] * METRICS_FIELDS;
}

// The row of a matrix that has no metrics.
__device__ __forceinline__ void write_unmeasured(double* row, MetricsStatus status, Stage stage) {
  write_metrics(row, {0, NAN, NAN, NAN, NAN}, status, stage);
  row[RANK] = NAN;
}

// Says whether the weights are what they were on the caller's stream. If not, the row says so too.
template <class Team>
__device__ __forceinline__ bool are_unchanged(Team& team, const SpectrumArguments& arguments, int number,
                                              Stage stage) {
  const CudaMatrix& matrix = arguments.matrix[number];
  const unsigned long long now = fingerprint(team, matrix, 0, matrix.L, 0, matrix.M);
  if (now == arguments.state[number].fingerprint) return true;
  if (team.rank() == 0) write_unmeasured(row_of(arguments, number), CHANGED, stage);
  return false;
}

// The tiles of a block of the Gram matrices.
template <class T>
struct GramTiles {
  const CudaMatrix& matrix;
  unsigned char* workspace;
  GramShared<T>& shared;
  const GramItem& item;

  template <class Element>
  __device__ __forceinline__ void operator()(const Element* weight) const {
    // Weights in fp64 begin in the stage of that precision.
    if constexpr (sizeof(Element) <= sizeof(T)) {
      if constexpr (gram_tiles<T>() == 2) {
        if (item.column_tile > item.row_tile) return multiply<2>(weight);
      }
      multiply<1>(weight);
    }
  }

  template <int tiles, class Element>
  __device__ __forceinline__ void multiply(const Element* weight) const {
    if (matrix.small.stride[3] == 1) {
      multiply<tiles, true>(weight);
    } else {
      multiply<tiles, false>(weight);
    }
  }

  template <int tiles, bool along_rows, class Element>
  __device__ __forceinline__ void multiply(const Element* weight) const {
    BlockTeam team;
    multiply_tiles<tiles, along_rows>(team, matrix, weight, item, workspace, shared);
  }
};

template <class T>
__device__ __forceinline__ void gram_block(const SpectrumArguments& arguments) {
  const GramItem& item = arguments.item[blockIdx.x];
  if (sizeof(T) == 8 && arguments.state[item.matrix].stage != STAGE_FP64) return;
  const CudaMatrix& matrix = arguments.matrix[item.matrix];
  with_elements(matrix.dtype, matrix.weight,
                GramTiles<T>{matrix, arguments.workspace,
                             *reinterpret_cast<GramShared<T>*>(shared_memory() + TEAM_SHARED), item});
  if (sizeof(T) == 4 && takes_fingerprint(item)) take_fingerprint(arguments, item);
}

// The places of one reduction in the workspace.
template <class T>
struct ReductionPlaces {
  const CudaReduction& reduction;
  ReductionVectors places;
  unsigned char* workspace;
  int stride;

  __device__ __forceinline__ ReductionPlaces(const SpectrumArguments& arguments, const CudaMatrix& matrix)
      : reduction(matrix.reduction[stage_of<T>()]),
        places(matrix.stride, reduction.blocks, reduction.near_rows),
        workspace(arguments.workspace),
        stride(matrix.stride) {}

  __device__ __forceinline__ T* vector(int place) const {
    return reinterpret_cast<T*>(workspace + reduction.vectors) + place;
  }
  __device__ __forceinline__ T* matrix() const { return reinterpret_cast<T*>(workspace + reduction.matrix); }
  __device__ __forceinline__ Tridiagonal<T> tridiagonal() const {
    return {vector(places.tridiagonal), stride};
  }
};

template <class T>
__device__ __forceinline__ void tridiagonal_block(const SpectrumArguments& arguments) {
  const TeamBlock mine = arguments.block[blockIdx.x];
  SpectrumState& state = arguments.state[mine.matrix];
  if (state.stage != stage_of<T>()) return;
  const CudaMatrix& matrix = arguments.matrix[mine.matrix];
  const ReductionPlaces<T> at(arguments, matrix);
  const Slabs slabs = slabs_of(matrix, stage_of<T>());
  const int n = slabs.n, width = slabs.width(mine.block), packs = width / SLAB_PACK;
  GridTeam team(mine.block, slabs.blocks,
                arguments.grid_barrier + stage_of<T>() * arguments.matrices + mine.matrix);
  auto& block = team.block();
  T* const gram = at.matrix() + slabs.slab(mine.block);

  // This block's part of the diagonal.
  const auto diagonal = [&](int c) {
    const int i = slabs.column(mine.block, c);
    return i < n ? double(gram[i * width + c]) : 0.0;
  };
  double trace = 0.0;
  for (int c = block.rank(); c < width; c += block.size()) trace += diagonal(c);
  trace = team.sum(trace);
  if (!in_range(trace, stage_of<T>())) {
    if (team.rank() == 0) state.stage = next_stage<T>();
    return;
  }
  const double zero = largest_zero_row(n, double(matrix.M), trace, stage_of<T>());
  int nonzero_rows = 0;
  for (int c = block.rank(); c < width; c += block.size()) nonzero_rows += diagonal(c) > zero;
  nonzero_rows = team.sum(nonzero_rows);

  // rmsgd/backends/cuda_teams.py decides what of this is in shared memory. There a row is an odd number of
  // packs, so that threads that work on different rows do not wait for one bank.
  T* const parts = reinterpret_cast<T*>(shared_memory() + TEAM_SHARED);
  const int widest = slabs.packs_of(0);
  T* near = parts + part_elements(kept_rows<T>(n, widest, block.size()), widest, block.size());
  T* rows = at.vector(at.places.rows) + mine.block * reflected_elements(at.stride);
  if (at.reduction.near_rows) {
    rows = near;
    near += reflected_elements(at.stride);
  }
  // To a trace in [1, 2).
  const int exponent = -ilogb(trace);
  if (team.rank() == 0) {
    state.trace = ldexp(trace, exponent);
    state.exponent = exponent;
    state.nonzero_rows = nonzero_rows;
  }
  Slab<T> slab = {gram, T(ldexp(1.0, exponent)), gram, width};
  if (at.reduction.near_slab) {
    slab.to = near;
    slab.stride = (packs | 1) * SLAB_PACK;
  }
  tridiagonalise(team, slabs, slab, at.vector(at.places.exchanged), rows, parts, at.tridiagonal());
}

// Every block of a matrix finds out for itself which values are needed. The first block notes it.
template <class T>
__device__ __forceinline__ void sturm_block(const SpectrumArguments& arguments) {
  const TeamBlock mine = arguments.block[blockIdx.x];
  SpectrumState& state = arguments.state[mine.matrix];
  if (state.stage != stage_of<T>()) return;
  const CudaMatrix& matrix = arguments.matrix[mine.matrix];
  const ReductionPlaces<T> at(arguments, matrix);
  BlockTeam team;
  T* const scratch = reinterpret_cast<T*>(shared_memory() + TEAM_SHARED);
  int* const counts = reinterpret_cast<int*>(scratch + STURM_SCRATCH);
  const SpectrumBounds bounds =
      spectrum_bounds(team, at.tridiagonal(), matrix.L, double(matrix.M), state.trace, state.nonzero_rows,
                      rounding_of(matrix.dtype), counts);
  find_part(team, at.tridiagonal(), matrix.L, bounds, mine.block, scratch, counts,
            at.vector(at.places.values));
  if (mine.block == 0 && team.rank() == 0) {
    state.lower = bounds.needed.lower;
    state.s_limit = bounds.needed.s_limit;
    state.upper = bounds.upper;
    state.needed = bounds.needed.count;
    state.nonzero = bounds.nonzero;
  }
}

template <class T>
__device__ __forceinline__ void measure_block(const SpectrumArguments& arguments) {
  const int number = arguments.first + int(blockIdx.x);
  SpectrumState& state = arguments.state[number];
  if (state.stage != stage_of<T>()) return;
  const CudaMatrix& matrix = arguments.matrix[number];
  const ReductionPlaces<T> at(arguments, matrix);
  const int L = matrix.L;
  const double M = double(matrix.M);
  const SpectrumBounds bounds = {{state.needed, state.lower, state.s_limit}, state.upper, state.nonzero};
  BlockTeam team;
  const TridiagonalSpectrum spectrum =
      known_spectrum(team, at.tridiagonal(), L, M, state.trace, bounds, at.vector(at.places.values),
                     reinterpret_cast<unsigned char*>(at.vector(at.places.scratch)));
  if (sizeof(T) == 8 && !are_unchanged(team, arguments, number, STAGE_FP64)) {
    if (team.rank() == 0) state.stage = STAGE_DONE;
    return;
  }
  // EVBMF is fp64 along one chain: a warp does it as fast as a block, and where fp64 is slow faster.
  if (threadIdx.x >= WARP) return;
  WarpTeam warp;
  const bool decided = measure_spectrum<T>(warp, spectrum, L, M, state.exponent, row_of(arguments, number));
  if (warp.rank() == 0) state.stage = decided ? STAGE_DONE : next_stage<T>();
}

struct ElementAt {
  long long offset;

  template <class Element>
  __device__ __forceinline__ double operator()(const Element* weight) const {
    return double(widen(weight[offset]));
  }
};

__device__ __forceinline__ double element_of(const CudaMatrix& matrix, long long column, int row) {
  const long long row_offset = offset_of(matrix.small, unsigned(row));
  return with_elements(matrix.dtype, matrix.weight,
                       ElementAt{row_offset + offset_of(matrix.large, unsigned(column))});
}

__device__ __forceinline__ void svd_matrix(GridTeam& team, const SpectrumArguments& arguments, int number) {
  const CudaMatrix& matrix = arguments.matrix[number];
  const int L = matrix.L;
  double* const row = row_of(arguments, number);
  // The reductions are done with the workspace.
  double* const scratch = reinterpret_cast<double*>(arguments.workspace);
  double* const gamma = scratch + singular_values_scratch(L);
  int* const counts = reinterpret_cast<int*>(gamma + L);

  double largest = 0.0, bad = 0.0;
  for (long long i = team.rank(); i < L * matrix.M; i += team.size()) {
    const double size = fabs(element_of(matrix, i % matrix.M, int(i / matrix.M)));
    if (!(size < INFINITY)) bad = 1.0;
    if (size > largest) largest = size;
  }
  bad = team.max(bad);
  largest = team.max(largest);
  if (bad > 0.0 || largest == 0.0) {
    if (!are_unchanged(team, arguments, number, STAGE_SVD) || team.rank() != 0) return;
    if (bad > 0.0) {
      write_unmeasured(row, NOT_FINITE, STAGE_SVD);
    } else {
      write_metrics(row, {0, 0.0, 0.0, 1.0, 0.0}, MEASURED, STAGE_SVD);
    }
    return;
  }
  int exponent = 0;  // a power of two in two steps: 2^-exponent itself may leave the range
  frexp(largest, &exponent);
  const double half = ldexp(1.0, -exponent / 2), other = ldexp(1.0, -exponent - (-exponent / 2));
  const auto scaled = [&](long long column, int at) { return element_of(matrix, column, at) * half * other; };
  singular_values(team, scaled, L, matrix.M, gamma, scratch, counts);
  if (!are_unchanged(team, arguments, number, STAGE_SVD)) return;
  const double zero = numerical_zero(team, gamma, L, double(matrix.M), rounding_of(matrix.dtype));
  team.barrier();
  for (int h = team.rank(); h < L; h += team.size()) {
    gamma[h] = gamma[h] > zero ? ldexp(gamma[h], exponent) : 0.0;
  }
  team.barrier();
  // EVBMF meets all the time and has little to do in between: one warp.
  if (team.rank() >= WARP) return;
  WarpTeam warp;
  measure_singular_values(warp, gamma, L, double(matrix.M), scratch, row);
}

}  // namespace
}  // namespace rmsgd

extern "C" __global__ void __launch_bounds__(rmsgd::GRAM_THREADS, 2)
    rmsgd_gram(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::gram_block<float>(arguments);
}

extern "C" __global__ void __launch_bounds__(rmsgd::GRAM_THREADS, 2)
    rmsgd_gram_double(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::gram_block<double>(arguments);
}

extern "C" __global__ void __launch_bounds__(rmsgd::GRAM_THREADS)
    rmsgd_gram_sum(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  const rmsgd::GramItem item = arguments.item[blockIdx.x];
  if (arguments.state[item.matrix].stage != rmsgd::STAGE_FP32) return;
  const rmsgd::CudaMatrix& matrix = arguments.matrix[item.matrix];
  rmsgd::BlockTeam team;
  rmsgd::add_partial_tiles(
      team, matrix, item, rmsgd::slabs_of(matrix, rmsgd::STAGE_FP32),
      reinterpret_cast<float*>(arguments.workspace + matrix.reduction[rmsgd::STAGE_FP32].matrix),
      reinterpret_cast<const float*>(arguments.workspace + matrix.partial));
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rmsgd_tridiagonal(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::tridiagonal_block<float>(arguments);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rmsgd_tridiagonal_double(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::tridiagonal_block<double>(arguments);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    rmsgd_sturm(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::sturm_block<float>(arguments);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    rmsgd_sturm_double(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::sturm_block<double>(arguments);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    rmsgd_measure(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::measure_block<float>(arguments);
}

extern "C" __global__ void __launch_bounds__(256, 1)
    rmsgd_measure_double(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::measure_block<double>(arguments);
}

// The whole grid, of up to 32 blocks, takes the matrices that wait for it one after the other, since there is
// scratch for one. Nobody changes meanwhile which matrices wait, so that all blocks go through the same ones.
extern "C" __global__ void __launch_bounds__(512, 1)
    rmsgd_svd(const __grid_constant__ rmsgd::SpectrumArguments arguments) {
  rmsgd::GridTeam team(int(blockIdx.x), arguments.svd_blocks,
                       arguments.grid_barrier + 2 * arguments.matrices);
  int waiting = 0;
  for (int number = team.block().rank(); number < arguments.matrices; number += team.block().size()) {
    waiting += arguments.state[number].stage == rmsgd::STAGE_SVD;
  }
  if (team.block().sum(waiting) == 0) return;  // the usual case, and blocks need not meet to know it
  for (int number = 0; number < arguments.matrices; ++number) {
    if (arguments.state[number].stage != rmsgd::STAGE_SVD) continue;
    rmsgd::svd_matrix(team, arguments, number);
    team.barrier();  // the scratch is free again
  }
}

// One warp computes EVBMF of values that are known.
extern "C" __global__ void __launch_bounds__(rmsgd::WARP, 1)
    rmsgd_values(const __grid_constant__ rmsgd::ValuesArguments arguments) {
  rmsgd::WarpTeam team;
  const int L = arguments.L;
  if (arguments.singular) {
    rmsgd::measure_singular_values(team, arguments.values, L, arguments.M, arguments.scratch, arguments.row);
    return;
  }
  rmsgd::measure_eigenvalues(team, arguments.values, L, arguments.M, arguments.rounding, arguments.scratch,
                             arguments.row);
}
