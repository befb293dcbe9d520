#include "eigenvalues_cpu.h"

#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

constexpr int W = LANES<double>;
constexpr int VECTORS = 4;
constexpr int BATCH = W * VECTORS;
constexpr int RESCALE = 8;

typedef uint64_t Bits __attribute__((vector_size(W * 8), may_alias));

// The exact power of two that brings the larger of |p| and |q| near 1. They are never both zero.
RMSGD_FN Vector<double> rescaling(Vector<double> p, Vector<double> q) {
  const Bits exponent_mask = Bits{} + 0x7ff0000000000000u;
  const Bits p_exponent = (Bits)p & exponent_mask, q_exponent = (Bits)q & exponent_mask;
  const Bits larger = p_exponent > q_exponent ? p_exponent : q_exponent;
  return (Vector<double>)((Bits{} + 0x7fe0000000000000u) - larger);
}

// Signs of the leading principal minors of T - s, which satisfy p_i = (d_i - s) p_{i-1} - e_{i-1}^2 p_{i-2}:
// as many changes of sign as eigenvalues below s. The classical quotients p_i / p_{i-1} need divisions and
// cost three times as much as these products with a rescaling by a power of two every few steps. Several
// vectors of shifts at once hide the latency of the recurrence.
void count_batch(const double* diagonal, const double* squares, int n, const double* shifts, int* above) {
  Vector<double> p[VECTORS], q[VECTORS];
  Bits changes[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    q[v] = Vector<double>{} + 1.0;
    p[v] = diagonal[0] - load(shifts + v * W);
    changes[v] = (Bits)p[v] >> 63;
  }
  for (int start = 1; start < n; start += RESCALE) {
    const int stop = start + RESCALE < n ? start + RESCALE : n;
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Vector<double> factor = rescaling(p[v], q[v]);
      p[v] *= factor;
      q[v] *= factor;
    }
    for (int i = start; i < stop; ++i) {
      const double d = diagonal[i], square = squares[i - 1];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Vector<double> next = (d - load(shifts + v * W)) * p[v] - square * q[v];
        changes[v] += ((Bits)next ^ (Bits)p[v]) >> 63;
        q[v] = p[v];
        p[v] = next;
      }
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    for (int lane = 0; lane < W; ++lane) above[v * W + lane] = n - int(changes[v][lane]);
  }
}

}  // namespace

void count_above(const double* diagonal, const double* squares, int n, const double* shifts, int shift_count,
                 int* above) {
  int done = 0;
  for (; done + BATCH <= shift_count; done += BATCH) {
    count_batch(diagonal, squares, n, shifts + done, above + done);
  }
  if (done == shift_count) return;
  double last[BATCH];
  int counts[BATCH];
  for (int k = 0; k < BATCH; ++k) last[k] = shifts[done + k < shift_count ? done + k : shift_count - 1];
  count_batch(diagonal, squares, n, last, counts);
  for (int k = 0; done + k < shift_count; ++k) above[done + k] = counts[k];
}

// Eigenvalues that share a bracket share its subdivision: m of them cut it into m + 1 equal parts, so that
// the first round is a grid and most later ones are bisections, one shift for each value.
void largest_eigenvalues(const double* diagonal, const double* squares, int n, int count, double lower,
                         double upper, double tolerance, double* values, double* work) {
  double* const low = work;
  double* const high = low + n;
  double* const shifts = high + n;
  int* const above = reinterpret_cast<int*>(shifts + n);
  for (int h = 0; h < count; ++h) {
    low[h] = lower;
    high[h] = upper;
  }
  for (;;) {
    int total = 0;
    for (int h = 0; h < count;) {
      int next = h + 1;
      while (next < count && low[next] == low[h] && high[next] == high[h]) ++next;
      const double width = high[h] - low[h];
      if (width > tolerance) {
        const int members = next - h;
        for (int k = 1; k <= members; ++k) shifts[total++] = low[h] + width * k / (members + 1);
      }
      h = next;
    }
    if (total == 0) break;
    count_above(diagonal, squares, n, shifts, total, above);
    int begin = 0;
    for (int h = 0; h < count;) {
      int next = h + 1;
      while (next < count && low[next] == low[h] && high[next] == high[h]) ++next;
      if (high[h] - low[h] > tolerance) {
        const int end = begin + next - h;
        int cut = end;  // the first shift with no more than h values above it
        for (int k = h; k < next; ++k) {
          while (cut > begin && above[cut - 1] <= k) --cut;
          if (cut < end) high[k] = shifts[cut];
          if (cut > begin) low[k] = shifts[cut - 1];
        }
        begin = end;
      }
      h = next;
    }
  }
  for (int h = 0; h < count; ++h) values[h] = 0.5 * (low[h] + high[h]);
}

}  // namespace RMSGD_ISA
}  // namespace rmsgd
