// A band becomes tridiagonal. Row after row, a reflection makes all but two elements of it zero, and spoils
// the band BAND rows further down; a reflection there mends the first spoilt row and moves the bulge on, to
// the end of the matrix. The next row's bulge passes over what the last one has left.
//
// All of it is in double. It is 6 n^2 BAND flops, some percent of the reduction to a band, and errors in
// proportion to 2^-53 need no place in the bounds of stage.h.
#include <limits.h>
#include <math.h>
#include <sched.h>

#include "band_cpu.h"
#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

constexpr int W = LANES<double>;

// A row of a block is BAND elements at any place. It is worked on as the whole vectors around them: what is
// beside them meets zeros and stays as it is, and no vector is in two lines of the cache.
constexpr int VECTORS = BAND / W + 1;
constexpr int WINDOW = VECTORS * W;

// Reflections that follow each other through the band, so that a block is still in the cache when the next
// comes. A reflection may work on a block once the one before it is two blocks ahead.
constexpr int SWEEPS = 4;

typedef Vector<double> Row[VECTORS];

// The reflection H = 1 - tau v v^T of one sweep. v begins at element `offset` of the window.
struct Reflector {
  double v[WINDOW] __attribute__((aligned(64)));
  double tau;
};

RMSGD_FN void load_row(Row& row, const double* from) {
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; ++i) row[i] = load(from + i * W);
}

RMSGD_FN double sum_of_products(const Row& x, const Row& y) {
  Vector<double> sum = x[0] * y[0];
#pragma GCC unroll 16
  for (int i = 1; i < VECTORS; ++i) sum += x[i] * y[i];
  return horizontal_sum<double>(sum);
}

// Sets the window to zero outside of the block.
RMSGD_FN void clear_outside(double* window, int offset) {
  for (int i = 0; i < offset; ++i) window[i] = 0.0;
  for (int i = offset + BAND; i < WINDOW; ++i) window[i] = 0.0;
}

// x (WINDOW), zero outside of the block, becomes the reflection that turns its block into (beta, 0, ...).
double reflect(Reflector& H, int offset) {
  double* const x = H.v;
  const double alpha = x[offset];
  x[offset] = 0.0;
  Row row;
  load_row(row, x);
  const double rest = sum_of_products(row, row);
  if (rest < 1e-290) {
    for (int i = 0; i < WINDOW; ++i) x[i] = 0.0;
    H.tau = 0.0;
    return alpha;
  }
  const double beta = alpha > 0.0 ? -sqrt(alpha * alpha + rest) : sqrt(alpha * alpha + rest);
  const double factor = 1.0 / (alpha - beta);
#pragma GCC unroll 16
  for (int i = 0; i < VECTORS; ++i) store(x + i * W, row[i] * factor);
  x[offset] = 1.0;
  H.tau = 2.0 / (1.0 + rest * factor * factor);
  return beta;
}

// sum over i of v_i times row i of the block, in the whole window.
RMSGD_FN void multiply(const double* block, const Reflector& H, int offset, double* out) {
  Row sum = {};
  for (int i = 0; i < BAND; ++i) {
    const double scale = H.v[offset + i];
    const double* const from = block + i * BAND_STRIDE;
#pragma GCC unroll 16
    for (int k = 0; k < VECTORS; ++k) sum[k] += scale * load(from + k * W);
  }
#pragma GCC unroll 16
  for (int k = 0; k < VECTORS; ++k) store(out + k * W, sum[k]);
  clear_outside(out, offset);
}

// Row i of the block -= a_i x + b_i y.
RMSGD_FN void subtract(double* block, const double* a, const double* x, const double* b, const double* y) {
  Row xs, ys;
  load_row(xs, x);
  load_row(ys, y);
  for (int i = 0; i < BAND; ++i) {
    double* const to = block + i * BAND_STRIDE;
#pragma GCC unroll 16
    for (int k = 0; k < VECTORS; ++k) store(to + k * W, load(to + k * W) - a[i] * xs[k] - b[i] * ys[k]);
  }
}

// D <- H D H for the block on the diagonal, all of which is kept.
void reflect_diagonal(double* block, const Reflector& H, int offset) {
  double w[WINDOW] __attribute__((aligned(64)));
  multiply(block, H, offset, w);
  Row vs, ws;
  load_row(vs, H.v);
  load_row(ws, w);
  const double shift = 0.5 * H.tau * sum_of_products(vs, ws);
#pragma GCC unroll 16
  for (int k = 0; k < VECTORS; ++k) store(w + k * W, H.tau * (ws[k] - shift * vs[k]));
  subtract(block, H.v + offset, w, w + offset, H.v);
}

// B <- H B H' for the block right of it. H' makes the first row of H B (beta, 0, ...), and takes the place
// of H.
void reflect_beside(double* block, Reflector& H, int offset) {
  double t[WINDOW] __attribute__((aligned(64))), z[BAND], scale[BAND];
  multiply(block, H, offset, t);
  Reflector next;
  const double first = H.tau * H.v[offset];
  for (int i = 0; i < WINDOW; ++i) next.v[i] = block[i] - first * t[i];
  clear_outside(next.v, offset);
  const double beta = reflect(next, offset);
  Row us, ts;
  load_row(us, next.v);
  load_row(ts, t);
  // z = tau' (H B) u
  const double inner = H.tau * sum_of_products(us, ts);
  for (int i = 0; i < BAND; i += 4) {
    Vector<double> sums[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const double* const from = block + (i + r) * BAND_STRIDE;
      sums[r] = load(from) * us[0];
#pragma GCC unroll 16
      for (int k = 1; k < VECTORS; ++k) sums[r] += load(from + k * W) * us[k];
    }
    const typename Simd<double>::four four = horizontal_sums<double>(sums);
    for (int r = 0; r < 4; ++r) z[i + r] = next.tau * (four[r] - inner * H.v[offset + i + r]);
  }
  for (int i = 0; i < BAND; ++i) scale[i] = H.tau * H.v[offset + i];
  subtract(block, scale, t, z, next.v);
  block[offset] = beta;
  for (int i = 1; i < BAND; ++i) block[offset + i] = 0.0;
  H = next;
}

// Step k of a sweep meets the block on the diagonal that begins at row sweep + 1 + k BAND, and the one right
// of it.
RMSGD_FN int steps_of(int sweep, int n) { return (n - 1 - sweep + BAND - 1) / BAND; }

void take_step(double* band, int n, int sweep, int step, Reflector& H) {
  const ptrdiff_t row = sweep + 1 + ptrdiff_t(step) * BAND;
  const int offset = int(row % W);
  double* const block = band + row * BAND_STRIDE + row - offset;
  if (step == 0) {
    double* const above = block - BAND_STRIDE;
    for (int i = 0; i < WINDOW; ++i) H.v[i] = above[i];
    clear_outside(H.v, offset);
    above[offset] = reflect(H, offset);
  }
  if (H.tau != 0.0) reflect_diagonal(block, H, offset);
  if (row + BAND >= n) return;
  reflect_beside(block + BAND, H, offset);
  // The next sweep's block on the diagonal has one more row, the mirror of a column.
  double* const mirror = block + BAND * BAND_STRIDE + offset;
  for (int i = 1; i < BAND; ++i) mirror[i] = block[i * BAND_STRIDE + BAND + offset];
}

}  // namespace

void chase_bulges(double* band, int n, double* diagonal, double* off_diagonal, const ThreadTeam& team) {
  int* const done = reinterpret_cast<int*>(band + band_size(n));  // steps of each group's last sweep
  const int sweeps = n - 2, groups = (sweeps + SWEEPS - 1) / SWEEPS;
  for (int group = team.rank(); group < groups; group += team.size()) done[group] = 0;
  team.barrier();
  for (int group = team.rank(); group < groups; group += team.size()) {
    Reflector H[SWEEPS];
    const int first = group * SWEEPS;
    const int count = sweeps - first < SWEEPS ? sweeps - first : SWEEPS;
    const int turns = steps_of(first, n) + 2 * (count - 1);
    for (int turn = 0; turn < turns; ++turn) {
      for (int spins = 0; group > 0 && __atomic_load_n(&done[group - 1], __ATOMIC_ACQUIRE) < turn + 2;
           ++spins) {
        if (spins >= 4096) sched_yield();
      }
      for (int s = 0; s < count; ++s) {
        const int step = turn - 2 * s;
        if (step >= 0 && step < steps_of(first + s, n)) take_step(band, n, first + s, step, H[s]);
      }
      const int last = turn - 2 * (count - 1) + 1;
      if (last > 0) __atomic_store_n(&done[group], last, __ATOMIC_RELEASE);
    }
    __atomic_store_n(&done[group], INT_MAX, __ATOMIC_RELEASE);
  }
  team.barrier();
  for (int i = 0; team.rank() == 0 && i < n; ++i) {
    const double* const at = band + i * (BAND_STRIDE + 1);
    diagonal[i] = at[0];
    if (i + 1 < n) off_diagonal[i] = at[1];
  }
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
