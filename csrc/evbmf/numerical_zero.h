// Which singular values of a weight are nothing but the rounding of its entries.
//
// A product of rank r, stored in a type of unit roundoff u, is a matrix of rank r plus errors: of each entry
// at most u of itself, and a few u_arithmetic from the sums that made it. They are as good as independent. A
// matrix L x M of independent errors, each 2 (u + 3 u_arithmetic) of the root mean square of the entries, has
// no singular value above
//
//   z = 2 (u + 3 u_arithmetic) |W|_F (1 / sqrt(L) + 1 / sqrt(M))
//
// Where fewer than L / (1 + alpha) singular values are above z, the others are numerically zero: Omega has no
// lower bound, so sigma^2 = 0, that number is the rank, and nothing is shrunk. Where there are more, the
// weight has full rank or noise of its own, and all values count as they are. (Products of Gaussian factors
// of rank 1 to 200 left .1 to .7 z. In 132 matrices of trained networks the value of that number was 120,000
// z and more in float32, 60 z in float16 and 8 z in bfloat16.)
#pragma once

#include "../dtype.h"
#include "../team.h"

namespace rmsgd {

// u + 3 u_arithmetic of a weight.
RMSGD_FN double rounding_of(Dtype dtype) {
  return unit_roundoff(dtype) + 3.0 * unit_roundoff(buffer_dtype(dtype));
}

// z^2, of a matrix whose squared singular values add up to `energy`.
RMSGD_FN double rounding_energy(double energy, double L, double M, double rounding) {
  const double z = 2.0 * rounding * (1.0 / sqrt(L) + 1.0 / sqrt(M));
  return z * z * energy;
}

// Whether so few values are above z that the others are zero.
RMSGD_FN bool is_low_rank(int above, int L, double M) { return above * (1.0 + L / M) < L; }

// A singular value at or below this is zero; gamma: all L of them from an SVD in float64, descending.
template <class Team>
RMSGD_FN double numerical_zero(Team& team, const double* gamma, int L, double M, double rounding) {
  const double of_svd = M * 0x1p-52 * gamma[0];
  double energy = 0.0;
  for (int h = team.rank(); h < L; h += team.size()) energy += gamma[h] * gamma[h];
  const double z = sqrt(rounding_energy(team.sum(energy), L, M, rounding));
  int above = 0;
  while (above < L && gamma[above] > z) ++above;
  return z > of_svd && is_low_rank(above, L, M) ? z : of_svd;
}

// How many values are other than zero: L where the weight is not of low rank, -1 where the eigenvalues of its
// Gram matrix, each known to within `error`, leave that open.
//   zero           z^2, in the units of the eigenvalues
//   nonzero_rows   of the weight: no more values than that are other than zero
//   above(t)       how many eigenvalues are above t
template <class Above>
RMSGD_FN int nonzero_values(const Above& above, double zero, double error, int nonzero_rows, int L,
                            double M) {
  const int surely = above(zero + error);
  if (!is_low_rank(surely, L, M)) return L;
  int possibly = zero > error ? above(zero - error) : L;
  if (possibly > nonzero_rows) possibly = nonzero_rows;
  return possibly <= surely ? surely : -1;
}

}  // namespace rmsgd
