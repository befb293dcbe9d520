// SIMD vectors of the instruction set a source is compiled for (see ../isa.h), as GCC and Clang
// vector extensions: the same source gives SSE2, AVX2, AVX-512 and NEON code.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "../team.h"

namespace rmsgd {
namespace RMSGD_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// There are never fewer than four lanes, since the kernels work on four rows at a time. Without AVX a vector
// of doubles is a pair of registers.
template <class T>
constexpr int LANES = VECTOR_BYTES / int(sizeof(T)) < 4 ? 4 : VECTOR_BYTES / int(sizeof(T));

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
  typedef double wide __attribute__((vector_size(LANES<float> * 8), may_alias));
  typedef float vector __attribute__((vector_size(LANES<float> * 4), may_alias));
  typedef float unaligned __attribute__((vector_size(LANES<float> * 4), aligned(4), may_alias));
};

template <>
struct Simd<double> {
  typedef double four __attribute__((vector_size(32), aligned(8), may_alias));
  typedef double wide __attribute__((vector_size(LANES<double> * 8), may_alias));
  typedef double vector __attribute__((vector_size(LANES<double> * 8), may_alias));
  typedef double unaligned __attribute__((vector_size(LANES<double> * 8), aligned(8), may_alias));
};

template <class T>
using Vector = typename Simd<T>::vector;

template <class T>
RMSGD_FN Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::unaligned*>(from);
}

template <class T>
RMSGD_FN void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename Simd<T>::unaligned*>(to) = x;
}

// As many doubles as a vector of T has lanes.
template <class T>
using Wide = typename Simd<T>::wide;

template <class T>
RMSGD_FN Wide<T> load_wide(const T* from) {
  return __builtin_convertvector(load(from), Wide<T>);
}

template <class T>
RMSGD_FN void store_narrow(T* to, Wide<T> x) {
  store(to, __builtin_convertvector(x, Vector<T>));
}

template <class T>
RMSGD_FN double horizontal_sum_wide(Wide<T> x) {
  double sum = 0.0;
  for (int i = 0; i < LANES<T>; ++i) sum += x[i];
  return sum;
}

template <class T>
RMSGD_FN T horizontal_sum(Vector<T> x) {
  T halves[LANES<T>];
  store(halves, x);
  for (int width = LANES<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) halves[i] += halves[i + width];
  }
  return halves[0];
}

// The elements of a and b, numbered one after the other, that LANE names. GCC before 12 has no
// __builtin_shufflevector, Clang has no __builtin_shuffle.
template <int... LANE, class V>
RMSGD_FN V pick(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LANE...);
#else
  typedef decltype(a < b) Lanes;
  return __builtin_shuffle(a, b, Lanes{LANE...});
#endif
}

// The lanes of a vector are units of UNIT lanes, in blocks of four units, or of all where there are fewer.
// In every block of the result lie the sums of neighbouring units of a, then those of b.
template <class T, int UNIT, int... LANE>
RMSGD_FN Vector<T> add_neighbours(Vector<T> a, Vector<T> b, std::integer_sequence<int, LANE...>) {
  constexpr int W = LANES<T>, UNITS = W / UNIT < 4 ? W / UNIT : 4, HALF = UNITS / 2 * UNIT;
  // Where the first one of the two units that make up unit p of a block is.
  constexpr auto first = [](int lane) {
    const int within = lane % (UNITS * UNIT), block = lane - within;
    return (within < HALF ? 0 : W - 2 * HALF) + block + within / UNIT * 2 * UNIT + within % UNIT;
  };
  return pick<first(LANE)...>(a, b) + pick<first(LANE) + UNIT...>(a, b);
}

template <class T, int UNIT>
RMSGD_FN Vector<T> add_neighbours(Vector<T> a, Vector<T> b) {
  return add_neighbours<T, UNIT>(a, b, std::make_integer_sequence<int, LANES<T>>());
}

// Sums over the lanes of four vectors, four by four: every four lanes hold a part of each of the four sums.
template <class T>
RMSGD_FN Vector<T> sums_by_fours(const Vector<T> (&x)[4]) {
  return add_neighbours<T, 1>(add_neighbours<T, 1>(x[0], x[1]), add_neighbours<T, 1>(x[2], x[3]));
}

// What sums_by_fours left of four vectors each, for as many vectors as there are lanes: their sums.
template <class T>
RMSGD_FN Vector<T> join_fours(const Vector<T> (&parts)[LANES<T> / 4]) {
  constexpr int COUNT = LANES<T> / 4;
  if constexpr (COUNT == 1) return parts[0];
  if constexpr (COUNT == 2) return add_neighbours<T, 4>(parts[0], parts[1]);
  if constexpr (COUNT == 4) {
    return add_neighbours<T, 4>(add_neighbours<T, 4>(parts[0], parts[1]),
                                add_neighbours<T, 4>(parts[2], parts[3]));
  }
}

// The sums over the lanes of four vectors, in one vector of four.
template <class T>
RMSGD_FN typename Simd<T>::four horizontal_sums(const Vector<T> (&x)[4]) {
  typedef typename Simd<T>::four Four;
  T lanes[LANES<T>] __attribute__((aligned(64)));
  store(lanes, sums_by_fours<T>(x));
  Four sum = *reinterpret_cast<const Four*>(lanes);
#pragma GCC unroll 4
  for (int l = 4; l < LANES<T>; l += 4) sum += *reinterpret_cast<const Four*>(lanes + l);
  return sum;
}

// dots[k] = rows[k] . x over columns [first, end), for `count` rows one stride apart. Whole vectors.
template <class T>
RMSGD_FN void dot_rows(const T* rows, ptrdiff_t stride, int count, const T* x, ptrdiff_t first, ptrdiff_t end,
                       T* dots) {
  constexpr int W = LANES<T>;
  int k = 0;
  for (; k + 4 <= count; k += 4) {
    const T* row = rows + k * stride;
    Vector<T> sum[4] = {};
    for (ptrdiff_t j = first; j < end; j += W) {
      const Vector<T> right = load(x + j);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[r] += load(row + r * stride + j) * right;
    }
    typedef typename Simd<T>::four Four;
    *reinterpret_cast<Four*>(dots + k) = horizontal_sums<T>(sum);
  }
  for (; k < count; ++k) {
    Vector<T> sum = {};
    for (ptrdiff_t j = first; j < end; j += W) sum += load(rows + k * stride + j) * load(x + j);
    dots[k] = horizontal_sum<T>(sum);
  }
}

// `n` rounded up or down to whole vectors.
template <class T>
RMSGD_FN ptrdiff_t vectors_up(ptrdiff_t n) {
  return (n + LANES<T> - 1) / LANES<T> * LANES<T>;
}

template <class T>
RMSGD_FN ptrdiff_t vectors_down(ptrdiff_t n) {
  return n / LANES<T> * LANES<T>;
}

// All matrix products are made of this: a tile of ROWS x (VECTORS * LANES) sums over k of a[k] b[k].
// Row r of the left operand at step k is a[k * a_step + r * a_row]; lane l of vector v of the right one is
// b[k * b_step + v * b_group + l].
// 4 x 3 vectors are 12 accumulators: enough to hide the latency of a fused multiply-add on every CPU
// we know, and with the operands they fill AVX2's 16 registers.
constexpr int TILE_ROWS = 4, TILE_VECTORS = 3;

// Rows of a tile of which the right operand comes from the second-level cache: where there are registers for
// it, twice as many products are formed of what is read.
constexpr int TALL_TILE_ROWS = VECTOR_BYTES == 64 ? 2 * TILE_ROWS : TILE_ROWS;

// Terms that are summed one after another. Where they are equal, as in a matrix of signs, rounding errors
// have one sign and grow with the length of the chain; sums of the sums of 64 keep them small for 3 % more
// time.
constexpr int CHAIN = 64;

template <class T, int VECTORS, int LENGTH = CHAIN, int ROWS = TILE_ROWS>
struct Tile {
  Vector<T> sum[ROWS][VECTORS];

  RMSGD_FN Tile(const T* a, ptrdiff_t a_step, const T* b, ptrdiff_t b_step, ptrdiff_t b_group,
                ptrdiff_t depth, ptrdiff_t a_row = 1) {
    add_chain<true>(a, a_step, a_row, b, b_step, b_group, depth < LENGTH ? depth : LENGTH);
    for (ptrdiff_t k = LENGTH; k < depth; k += LENGTH) {
      // The sums wait in memory. In registers they would take the place of the next chain's.
      __asm__ volatile("" : : "r"(&sum) : "memory");
      add_chain<false>(a + k * a_step, a_step, a_row, b + k * b_step, b_step, b_group,
                       depth - k < LENGTH ? depth - k : LENGTH);
    }
  }

 private:
  template <bool FIRST>
  RMSGD_FN void add_chain(const T* a, ptrdiff_t a_step, ptrdiff_t a_row, const T* b, ptrdiff_t b_step,
                          ptrdiff_t b_group, ptrdiff_t depth) {
    Vector<T> chain[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) chain[r][v] = Vector<T>{};
    }
    for (ptrdiff_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
      Vector<T> right[VECTORS];
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) right[v] = load(b + v * b_group);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) chain[r][v] += a[r * a_row] * right[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = FIRST ? chain[r][v] : sum[r][v] + chain[r][v];
    }
  }
};

}  // namespace RMSGD_ISA
}  // namespace rmsgd
