#include "eigenvalues_cpu.h"

#include "simd.h"

namespace rmsgd {
namespace RMSGD_ISA {
namespace {

// The determinant of T - s: value 2^exponent, 0 where it is not known. The exponent is kept modulo 2^12, in
// the place where a double has its own: those of shifts near each other differ by less.
struct Determinant {
  double value;
  uint64_t exponent;
};

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
//
// p_n itself is the determinant.
template <bool DETERMINANTS>
void count_batch(const double* diagonal, const double* squares, int n, const double* shifts, int* above,
                 Determinant* determinants) {
  Vector<double> p[VECTORS], q[VECTORS];
  Bits changes[VECTORS], exponents[VECTORS] = {};
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
      if (DETERMINANTS) exponents[v] -= (Bits)factor - 0x3ff0000000000000u;
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
    for (int lane = 0; lane < W; ++lane) {
      above[v * W + lane] = n - int(changes[v][lane]);
      if (DETERMINANTS) determinants[v * W + lane] = {p[v][lane], exponents[v][lane]};
    }
  }
}

template <bool DETERMINANTS>
void count_all(const double* diagonal, const double* squares, int n, const double* shifts, int shift_count,
               int* above, Determinant* determinants) {
  int done = 0;
  for (; done + BATCH <= shift_count; done += BATCH) {
    count_batch<DETERMINANTS>(diagonal, squares, n, shifts + done, above + done,
                              determinants + (DETERMINANTS ? done : 0));
  }
  if (done == shift_count) return;
  double last[BATCH];
  int counts[BATCH];
  Determinant values[BATCH];
  for (int k = 0; k < BATCH; ++k) last[k] = shifts[done + k < shift_count ? done + k : shift_count - 1];
  count_batch<DETERMINANTS>(diagonal, squares, n, last, counts, values);
  for (int k = 0; done + k < shift_count; ++k) {
    above[done + k] = counts[k];
    if (DETERMINANTS) determinants[done + k] = values[k];
  }
}

// Where the determinant, interpolated between the ends of a bracket, is 0, moved towards the middle by
// about the error of this estimate, so that the value lies between it and the nearer end as a rule, and the
// bracket shrinks from both sides (I. F. D. Oliveira, R. H. C. Takahashi, ACM Transactions on Mathematical
// Software 47, 2020). The middle where the determinant has one sign at both ends or is not known.
double estimate(double low, double high, const Determinant& at_low, const Determinant& at_high,
                double spacing, double tolerance) {
  const double width = high - low, middle = low + 0.5 * width;
  const int64_t apart = int64_t(at_high.exponent - at_low.exponent) >> 52;
  if (!(at_low.value * at_high.value < 0.0) || apart > 500 || apart < -500) return middle;
  const uint64_t power = uint64_t(apart + 1023) << 52;
  double factor;
  __builtin_memcpy(&factor, &power, sizeof(factor));
  const double right = at_high.value * factor;
  const double root = low + width * (at_low.value / (at_low.value - right));
  const double error = width * width / spacing * 0.2 + 0.4 * tolerance;
  if (root < middle) return root + error < middle ? root + error : middle;
  return root - error > middle ? root - error : middle;
}

}  // namespace

void count_above(const double* diagonal, const double* squares, int n, const double* shifts, int shift_count,
                 int* above) {
  count_all<false>(diagonal, squares, n, shifts, shift_count, above, nullptr);
}

// Eigenvalues that share a bracket share its subdivision: m of them cut it into m + 1 equal parts, so that
// the first round is a grid. A bracket of one value is cut where the determinant says that the value is, or
// in the middle if the last cut took less than half of it off.
void largest_eigenvalues(const double* diagonal, const double* squares, int n, int count, double lower,
                         double upper, double tolerance, double relative, double* values, double* work) {
  double* const low = work;
  double* const high = low + n;
  double* const shifts = high + n;
  double* const spacing = shifts + n;  // the width of a bracket when it was the first value's own; else 0
  Determinant* const at_low = reinterpret_cast<Determinant*>(spacing + n);
  Determinant* const at_high = at_low + n;
  Determinant* const determinants = at_high + n;
  int* const above = reinterpret_cast<int*>(determinants + n);
  bool* const halve = reinterpret_cast<bool*>(above + n);
  for (int h = 0; h < count; ++h) {
    low[h] = lower;
    high[h] = upper;
    spacing[h] = 0.0;
    at_low[h] = at_high[h] = {0.0, 0};
    halve[h] = false;
  }
  // The width at which a bracket is narrow enough.
  const auto allowed = [&](int h) { return relative * low[h] > tolerance ? relative * low[h] : tolerance; };
  for (;;) {
    int total = 0;
    for (int h = 0; h < count;) {
      int next = h + 1;
      while (next < count && low[next] == low[h] && high[next] == high[h]) ++next;
      const double width = high[h] - low[h], most = allowed(h);
      if (width > most) {
        const int members = next - h;
        if (members == 1 && spacing[h] == 0.0) spacing[h] = width;
        if (members == 1 && !halve[h]) {
          shifts[total++] = estimate(low[h], high[h], at_low[h], at_high[h], spacing[h], most);
        } else {
          for (int k = 1; k <= members; ++k) shifts[total++] = low[h] + width * k / (members + 1);
        }
      }
      h = next;
    }
    if (total == 0) break;
    count_all<true>(diagonal, squares, n, shifts, total, above, determinants);
    int begin = 0;
    for (int h = 0; h < count;) {
      int next = h + 1;
      while (next < count && low[next] == low[h] && high[next] == high[h]) ++next;
      if (high[h] - low[h] > allowed(h)) {
        const int end = begin + next - h;
        int cut = end;  // the first shift with no more than h values above it
        for (int k = h; k < next; ++k) {
          while (cut > begin && above[cut - 1] <= k) --cut;
          const double width = high[k] - low[k];
          if (cut < end) {
            high[k] = shifts[cut];
            at_high[k] = determinants[cut];
          }
          if (cut > begin) {
            low[k] = shifts[cut - 1];
            at_low[k] = determinants[cut - 1];
          }
          halve[k] = !halve[k] && high[k] - low[k] > 0.5 * width;
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
