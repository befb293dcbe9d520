// Householder reflections H = 1 - tau v v^T of vectors in memory, v_1 = 1.
#pragma once

#include <math.h>

#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {

// A vector whose remaining part has a sum of squares below this is zero: the matrix has norm 1, and the
// squares would not be accurate any more.
template <class T>
constexpr double NEGLIGIBLE = sizeof(T) == 4 ? 1e-30 : 1e-290;

// The reflection that turns (x_1, x_2, ...) into (beta, 0, ...); x becomes v. Returns tau, which is 0 where
// there is nothing to reflect. x begins at `at`, the vector that holds it is zero before. The sums are formed
// in T by vectors, the scalars in double.
template <class T>
RMSGD_FN double reflect(T* x, ptrdiff_t at, ptrdiff_t end, double* beta) {
  constexpr int W = LANES<T>;
  const double alpha = double(x[at]);
  for (ptrdiff_t j = vectors_down<T>(at); j <= at; ++j) x[j] = T(0);
  Wide<T> squares = {};
  for (ptrdiff_t j = vectors_down<T>(at); j < end; j += W) squares += load_wide(x + j) * load_wide(x + j);
  const double rest = horizontal_sum_wide<T>(squares);
  if (rest < NEGLIGIBLE<T>) {
    *beta = alpha;
    return 0.0;
  }
  *beta = alpha > 0.0 ? -sqrt(alpha * alpha + rest) : sqrt(alpha * alpha + rest);
  const double factor = 1.0 / (alpha - *beta);
  squares = Wide<T>{};
  for (ptrdiff_t j = vectors_down<T>(at); j < end; j += W) {
    store_narrow(x + j, load_wide(x + j) * factor);
    squares += load_wide(x + j) * load_wide(x + j);
  }
  x[at] = T(1);
  return 2.0 / (1.0 + horizontal_sum_wide<T>(squares));
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
