#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <new>
#include <numeric>
#include <vector>

#include "../evbmf/needed.h"
#include "../evbmf/numerical_zero.h"
#include "../isa.h"
#include "../parallel.h"
#include "deflate_cpu.h"
#include "eigenvalues_cpu.h"
#include "gram_cpu.h"
#include "measure.h"
#include "memory_cpu.h"
#include "positions_cpu.h"
#include "stage.h"
#include "tridiagonal_cpu.h"

namespace rmsgd {
namespace {

// From this size on all threads work on one matrix; below, each thread has its own.
constexpr std::int64_t SHARED_ROWS = 1024;

std::int64_t rows_of(const MatrixView& matrix) { return matrix.small.length(); }
std::int64_t columns_of(const MatrixView& matrix) { return matrix.large.length(); }

double cost_of(const MatrixView& matrix) {
  const double rows = double(rows_of(matrix)), columns = double(columns_of(matrix));
  return rows * rows * (rows + columns);
}

// Where the results of one matrix go.
struct Output {
  double* row;
  WantedValues wanted;
  double* gamma;  // for the values that are wanted, 0 so far
};

// How exact a reduced matrix was found to be.
enum Trust {
  NOT_TRUSTED,
  TRUSTED_PRODUCT,  // no, but the product in fp32 would do without the errors of the reduction
  TRUSTED,
};

// ---- memory ----

// What one matrix of up to `rows` rows needs: its Gram matrix in double, and as much again for packed
// columns, then for the copy in fp32 that is reduced.
class Workspace {
 public:
  explicit Workspace(std::int64_t rows) {
    const std::size_t stride = tridiagonal_stride(rows), padded = (rows + MOST_DEFLATED + 15) / 16 * 16;
    const std::size_t gram_bytes = stride * padded * sizeof(double);
    const std::size_t copy_bytes =
        std::max(gram_packed_size(rows) * sizeof(double), stride * padded * sizeof(float));
    const std::size_t work_bytes = tridiagonal_work_size(rows) * sizeof(double);
    const std::size_t vector_bytes = (8 * padded + eigenvalues_work_size(padded)) * sizeof(double);
    memory_ = allocate<char>(gram_bytes + copy_bytes + work_bytes + vector_bytes);
    if (memory_ == nullptr) throw std::bad_alloc();
    char* next = memory_.get();
    gram = reinterpret_cast<double*>(next);
    copy = next += gram_bytes;
    work = next += copy_bytes;
    diagonal = reinterpret_cast<double*>(next += work_bytes);
    squares = diagonal + padded;
    values = squares + padded;
    tails = values + padded;
    eigenvalues_work = tails + 2 * padded;
  }

  double* gram;
  void* copy;  // packed columns, then the fp32 copy of the Gram matrix
  void* work;
  double *diagonal, *squares, *values, *tails, *eigenvalues_work;

  // Books the time since the last call to a part. Rank 0 of a team calls it.
  void lap(MeasurePart part) {
    const Clock::time_point now = Clock::now();
    seconds[part] += std::chrono::duration<double>(now - last_lap_).count();
    last_lap_ = now;
  }
  void start_lap() { last_lap_ = Clock::now(); }
  double seconds[MEASURE_PARTS] = {};

  // What rank 0 decides for its team.
  double trace = 0.0;
  double product_error = 0.0;  // of a product in fp32
  double rest_error = 0.0;     // of what is left of it
  Deflation taken = {false, 0, {}, 0.0};
  int nonzero_rows = 0;
  int scale_exponent = 0;
  bool repeat = false;
  bool look = false;  // for large eigenvalues, before that
  Stage precision = STAGE_FP32;
  Trust trust = NOT_TRUSTED;
  MetricsStatus status = MEASURED;

 private:
  using Clock = std::chrono::steady_clock;
  Memory<char> memory_;
  Clock::time_point last_lap_;
};

// ---- one matrix: Gram, tridiagonal form, eigenvalues ----

// packed: the columns of the matrix where they are packed already; else null.
void form_gram(const MatrixView& matrix, const float* packed, Stage stage, Workspace& space,
               const ThreadTeam& team) {
  const std::ptrdiff_t stride = tridiagonal_stride(rows_of(matrix));
  const double scale = std::ldexp(1.0, space.scale_exponent);
  if (stage == STAGE_FP32 && packed != nullptr) {
    RMSGD_DISPATCH(gram_of_packed)(rows_of(matrix), columns_of(matrix), packed, space.gram, stride);
  } else if (stage == STAGE_FP32) {
    RMSGD_DISPATCH(gram_f32)(matrix, float(scale), space.gram, stride, static_cast<float*>(space.copy), team);
  } else {
    RMSGD_DISPATCH(gram_f64)(matrix, scale, space.gram, stride, static_cast<double*>(space.copy), team);
  }
  if (team.rank() == 0) {
    space.trace = 0.0;
    double largest = 0.0;
    const std::int64_t rows = rows_of(matrix);
    for (std::int64_t i = 0; i < rows; ++i) {
      space.trace += space.gram[i * stride + i];
      largest = std::max(largest, space.gram[i * stride + i]);
    }
    space.product_error = space.rest_error = product_error(space.trace, largest);
    space.taken = {false, 0, {}, 0.0};
    const double zero = largest_zero_row(double(rows), double(columns_of(matrix)), space.trace, stage);
    space.nonzero_rows = 0;
    for (std::int64_t i = 0; i < rows; ++i) space.nonzero_rows += space.gram[i * stride + i] > zero;
  }
}

// The Gram matrix of the weight, scaled by a power of two where its squares would leave the range of the
// format. Almost no weight needs it, so the first attempt does without and the trace tells.
void form_scaled_gram(const MatrixView& matrix, const float* packed, Stage stage, Workspace& space,
                      const ThreadTeam& team) {
  if (team.rank() == 0) space.scale_exponent = 0;
  team.barrier();
  form_gram(matrix, packed, stage, space, team);
  if (team.rank() == 0) {
    space.status = MEASURED;
    space.repeat = !in_range(space.trace, stage);
    if (space.repeat) {
      const Magnitude magnitude = RMSGD_DISPATCH(magnitude)(matrix);
      if (!magnitude.finite) space.status = NOT_FINITE;
      space.repeat = magnitude.finite && magnitude.largest > 0.0;
      const int limit = stage == STAGE_FP32 ? 126 : 1022;
      if (space.repeat) space.scale_exponent = std::min(-std::ilogb(magnitude.largest), limit);
    }
  }
  team.barrier();
  if (space.repeat) form_gram(matrix, nullptr, stage, space, team);
  team.barrier();
}

// Takes large eigenvalues off a product in fp32 if its eigenvalues are more unequal than `least`, and bounds
// the errors of the rest.
void take_off_large(const MatrixView& matrix, double least, Workspace& space, const ThreadTeam& team) {
  const int rows = int(rows_of(matrix));
  if (rows < DEFLATE_LEAST) return;
  double* const left = space.values;
  double* const spread = space.tails;
  if (team.rank() == 0) {
    space.taken = RMSGD_DISPATCH(deflate)(space.gram, rows, tridiagonal_stride(rows), space.trace, least,
                                          left, static_cast<double*>(space.copy));
  }
  team.barrier();
  if (!space.taken.looked) return;
  const float scale = float(std::ldexp(1.0, space.scale_exponent));
  RMSGD_DISPATCH(product_spread)(matrix, scale, left, spread, space.diagonal, static_cast<float*>(space.copy),
                                 team);
  if (team.rank() == 0)
    space.rest_error = std::min(space.product_error, product_error_of_rest(spread, left, rows));
  team.barrier();
}

// Scales the Gram matrix to a trace in [1, 2) and reduces it: `diagonal` and `squares` on rank 0, with what
// was taken off behind. Returns the exponent of that scale.
int reduce(int rows, Stage precision, Workspace& space, const ThreadTeam& team) {
  const int exponent = -std::ilogb(space.trace);
  const double scale = std::ldexp(1.0, exponent);
  if (precision == STAGE_FP32) {
    RMSGD_DISPATCH(tridiagonalise_f32)(space.gram, scale, rows, static_cast<float*>(space.copy),
                                       space.diagonal, space.squares, static_cast<float*>(space.work), team);
  } else {
    RMSGD_DISPATCH(tridiagonalise_f64)(space.gram, scale, rows, space.gram, space.diagonal, space.squares,
                                       static_cast<double*>(space.work), team);
  }
  for (int k = 0; team.rank() == 0 && k < space.taken.count; ++k) {
    space.diagonal[rows + k] = scale * space.taken.values[k];
    space.squares[rows + k - 1] = 0.0;
  }
  return exponent;
}

struct Interval {
  double upper;      // no eigenvalue is above
  double remaining;  // none of those that were not taken off
  double tolerance;
  double mean_square;     // of those that were not taken off
  double relative = 0.0;  // see largest_eigenvalues
};

// Squares the off-diagonal and bounds the eigenvalues (Gershgorin): of the reduced matrix, which has `rows`
// rows, and of what was taken off.
Interval prepare(int rows, Stage precision, Workspace& space) {
  double upper = 0.0, remaining = 0.0, squares = 0.0;
  const int size = rows + space.taken.count;
  for (int i = 0; i < size; ++i) {
    const double left = i > 0 ? std::fabs(space.tails[i - 1]) : 0.0;
    const double right = i + 1 < size ? std::fabs(space.squares[i]) : 0.0;
    upper = std::max(upper, space.diagonal[i] + left + right);
    if (i < rows) {
      remaining = upper;
      squares += space.diagonal[i] * space.diagonal[i] + 2.0 * right * right;
    }
    space.tails[i] = right;
  }
  for (int i = 0; i + 1 < size; ++i) {
    space.squares[i] = std::max(space.squares[i] * space.squares[i], SMALLEST_SQUARE);
  }
  // Beside an eigenvalue that was taken off, others may be too small to ask for so many digits of it.
  const double tolerance = remaining * (precision == STAGE_FP32 ? 0x1p-31 : 0x1p-51);
  return {upper, remaining, std::max(tolerance, upper * 0x1p-51), squares / rows};
}

// Eigenvalues of a positive semidefinite matrix: what rounding put below zero is zero.
void find_largest(int rows, int count, double lower, const Interval& interval, Workspace& space) {
  RMSGD_DISPATCH(largest_eigenvalues)
  (space.diagonal, space.squares, rows, count, lower, interval.upper, interval.tolerance, interval.relative,
   space.values, space.eigenvalues_work);
}

// ---- EVBMF ----

// For every value that was taken off there is a zero that is no eigenvalue of the Gram matrix; `size` counts
// these too.
NeededValues needed_values(int rows, int size, double columns, double trace, const Interval& interval,
                           Workspace& space) {
  const BoundGrid grid = {double(rows), columns, trace};
  double shifts[BoundGrid::SIZE];
  int counts[BoundGrid::SIZE];
  shifts[0] = grid.first_shift();
  for (int i = 1; i < BoundGrid::SIZE; ++i) shifts[i] = shifts[i - 1] * BoundGrid::RATIO;
  RMSGD_DISPATCH(count_above)(space.diagonal, space.squares, size, shifts, BoundGrid::SIZE, counts);
  // Rounding may have left them above a shift; with fewer the bound holds as well.
  for (int& count : counts) count = std::max(0, count - (size - rows));
  const double limit = grid.s_limit(counts);
  if (limit == INFINITY) return all_values(rows);
  const double lower = grid.lower(limit);
  if (lower >= interval.upper) return {0, lower, limit};
  int count;
  RMSGD_DISPATCH(count_above)(space.diagonal, space.squares, size, &lower, 1, &count);
  return {std::min(count, rows), lower, limit};
}

// Writes gamma = sqrt(lambda) for `count` eigenvalues of a Gram matrix that was scaled by 2^exponent; 0 where
// lambda is not above `zero`.
void write_values(const double* lambda, int count, double zero, int exponent, double* gamma) {
  const int odd = exponent & 1;
  for (int h = 0; h < count; ++h) {
    gamma[h] =
        lambda[h] > zero ? std::ldexp(std::sqrt(std::ldexp(lambda[h], odd)), -(exponent + odd) / 2) : 0.0;
  }
}

// How far an eigenvalue may be off: because of everything, and because of the product alone. Those that were
// taken off have their own bound.
struct Errors {
  double all, product, taken;
};

// largest: the largest eigenvalue, remaining: the largest of what was not taken off, mean_square: of what was
// not taken off. They are of the matrix of `rows` rows that was scaled by 2^exponent and reduced.
Errors errors_of(int rows, Stage stage, Stage precision, int exponent, double largest, double remaining,
                 double mean_square, const Workspace& space) {
  const bool banded = is_banded(rows, precision == STAGE_FP32 ? sizeof(float) : sizeof(double));
  const double band = banded ? band_error(precision, mean_square) : 0.0;
  const double whole = std::max(gram_error(stage, largest), band);
  if (stage == STAGE_FP64) return {whole, whole, whole};
  const double scale = std::ldexp(1.0, exponent);
  double product = scale * space.rest_error, taken = scale * space.product_error;
  const int count = space.taken.count;
  if (count > 0) {
    // What couples the parts is known but for errors of the product.
    const double gap = scale * space.taken.values[count - 1] - remaining;
    const double coupling = scale * (std::sqrt(space.taken.coupling) + space.product_error);
    const double moved = gap > coupling ? coupling * coupling / gap : coupling;
    product += moved;
    taken += moved;
  }
  const bool plain = count == 0 && precision == STAGE_FP32;
  const double parts = product + std::max(gram_error(precision, remaining), band);
  return {plain || whole < parts ? whole : parts, product, std::min(whole, taken)};
}

// How much of an eigenvalue its error may be if three digits are to be known, where the search finds each
// within half of `relative` times itself.
double share_of_error(double relative) { return HALF_ERROR - 0.5 * relative; }

// Whether the larger half of the eigenvalues, of which `taken` were taken off, is known to three digits.
Trust trust_in_half(const double* values, int nonzero, int rows, int taken, Stage stage, const Errors& errors,
                    double relative) {
  if (stage == STAGE_FP64 || nonzero <= rows / 2) return TRUSTED;
  const double share = share_of_error(relative);
  if (taken > 0 && !(errors.taken <= share * values[taken - 1])) return NOT_TRUSTED;
  const double most = share * values[(rows - 1) / 2];
  return errors.all <= most ? TRUSTED : errors.product <= most ? TRUSTED_PRODUCT : NOT_TRUSTED;
}

// The metrics of a Gram matrix, formed in the precision of `stage` and reduced in that of `precision`, of
// trace `trace` times 2^exponent. Whether they, and the values that are wanted, are to be trusted.
Trust measure_reduced(const MatrixView& matrix, Stage stage, Stage precision, int exponent, Workspace& space,
                      Output out) {
  const int rows = int(rows_of(matrix));
  const double columns = double(columns_of(matrix));
  const double trace = std::ldexp(space.trace, exponent);
  const int taken = space.taken.count, size = rows + taken;
  const Interval interval = prepare(rows, precision, space);
  const double zero = rounding_energy(trace, rows, columns, rounding_of(matrix.dtype));
  const auto above = [&](double shift) {
    int count;
    RMSGD_DISPATCH(count_above)(space.diagonal, space.squares, size, &shift, 1, &count);
    return count;
  };
  const auto errors_up_to = [&](double largest, double remaining) {
    return errors_of(rows, stage, precision, exponent, largest, remaining, interval.mean_square, space);
  };
  const int nonzero = nonzero_values(above, zero, errors_up_to(interval.upper, interval.remaining).all,
                                     space.nonzero_rows, rows, columns);
  if (nonzero < 0) {  // this Gram matrix cannot tell
    write_metrics(out.row, {0, 0.0, 0.0, 1.0, 0.0}, NEEDS_SVD, stage);
    space.lap(EIGENVALUES);
    return NOT_TRUSTED;
  }
  if (out.wanted == BULK_VALUES) {
    write_metrics(out.row, {0, 0.0, 0.0, 1.0, 0.0}, MEASURED, stage);
    // The search adds half as much to the error of an fp32 matrix, or a tenth of what three digits allow.
    Interval coarse = interval;
    if (precision == STAGE_FP32) {
      coarse.tolerance = std::max(interval.tolerance, interval.remaining * 0x1p-21);
      coarse.relative = 0.2 * HALF_ERROR;
    }
    find_largest(size, nonzero, 0.0, coarse, space);
    const double largest = nonzero > 0 ? space.values[0] : interval.upper;
    const double remaining = nonzero > taken ? space.values[taken] : interval.remaining;
    Errors errors = errors_up_to(largest, remaining);
    errors.all += 0.5 * coarse.tolerance;
    errors.product += 0.5 * coarse.tolerance;
    const double known = stage == STAGE_FP32 ? errors.all / share_of_error(coarse.relative) : errors.all;
    write_values(space.values, nonzero, known, exponent + 2 * space.scale_exponent, out.gamma);
    space.lap(EIGENVALUES);
    return trust_in_half(space.values, nonzero, rows, taken, stage, errors, coarse.relative);
  }
  NeededValues needed =
      nonzero < rows ? all_values(nonzero) : needed_values(rows, size, columns, trace, interval, space);
  double* const values = space.values;
  double rest = 0.0;
  for (;;) {
    find_largest(size, needed.count, needed.lower, interval, space);
    if (needed.count == nonzero) break;
    // The rest of the trace keeps enough digits only while it is not a small difference.
    rest = trace - std::accumulate(values, values + needed.count, 0.0);
    if (rest > 1e-4 * trace) break;
    needed = all_values(rows);
    rest = 0.0;
  }
  space.lap(EIGENVALUES);
  const double largest = needed.count > 0 ? values[0] : interval.upper;
  const double remaining = needed.count > taken ? values[taken] : interval.remaining;
  // No other value counts as zero: where rounding errors come near sigma^2 the guard below rejects the row.
  for (int h = 0; h < needed.count; ++h) values[h] /= columns;
  Solo solo;
  const FreeEnergyMinimum minimum = minimise_free_energy(solo, values, needed.count, rest / columns, rows,
                                                         columns, needed.s_limit, space.tails);
  ModeMetrics metrics = mode_metrics(solo, values, minimum, rows, columns);
  const double next = minimum.rank < needed.count ? values[minimum.rank] : needed.lower / columns;
  const Errors errors = errors_up_to(largest, remaining);
  const auto trusted_within = [&](double error) {
    return trustworthy(minimum, metrics, values, next, nonzero, rows, columns,
                       taken > 0 ? ValueErrors(error, errors.taken, taken) : ValueErrors(error));
  };
  Trust trust = NOT_TRUSTED;
  if (trusted_within(errors.all)) {
    trust = TRUSTED;
  } else if (errors.product < errors.all && trusted_within(errors.product)) {
    trust = TRUSTED_PRODUCT;
  }
  const int total_exponent = exponent + 2 * space.scale_exponent;
  metrics.noise_variance = std::ldexp(metrics.noise_variance, -total_exponent);
  write_metrics(out.row, metrics, trust == TRUSTED || stage == STAGE_FP32 ? MEASURED : NEEDS_SVD, stage);
  if (out.wanted == KEPT_VALUES) {
    for (int h = 0; h < minimum.rank; ++h) values[h] *= columns;
    write_values(values, minimum.rank, 0.0, total_exponent, out.gamma);
  } else if (out.wanted != NO_VALUES) {
    // The metrics are those of an epoch end, which looks for no more values than it needs.
    find_largest(size, nonzero, 0.0, interval, space);
    write_values(values, nonzero, errors.all, total_exponent, out.gamma);
    if (out.wanted == HALF_VALUES && trust != NOT_TRUSTED)
      trust = std::min(trust, trust_in_half(values, nonzero, rows, taken, stage, errors, interval.relative));
  }
  space.lap(EVBMF);
  return trust;
}

// Measures one matrix by the team. Every member takes the same way through it. packed: see form_gram.
void measure_one(const MatrixView& matrix, const float* packed, Workspace& space, const ThreadTeam& team,
                 Output out) {
  const int rows = int(rows_of(matrix));
  const bool in_fp64 = matrix.dtype == Dtype::float64 || rows == 1 || out.wanted == ALL_VALUES;
  Stage stage = in_fp64 ? STAGE_FP64 : STAGE_FP32;
  if (team.rank() == 0) space.start_lap();
  // A product in fp32 may be reduced three times, in fp32, in fp32 without its largest eigenvalues, and in
  // fp64, before one in fp64 is formed.
  for (;; stage = STAGE_FP64) {
    form_scaled_gram(matrix, packed, stage, space, team);
    if (team.rank() == 0) space.lap(GRAM);
    if (space.status == NOT_FINITE || space.trace == 0.0 || rows == 1) {
      const double columns = double(columns_of(matrix));
      const double noise = std::ldexp(space.trace / columns, -2 * space.scale_exponent);
      if (team.rank() == 0) {
        write_metrics(out.row, {0, noise, 0.0, 1.0, 0.0}, space.status, stage);
        if (out.wanted >= HALF_VALUES && rows == 1)
          write_values(&space.trace, 1, 0.0, 2 * space.scale_exponent, out.gamma);
      }
      break;
    }
    if (team.rank() == 0) space.precision = stage;
    if (stage == STAGE_FP32) take_off_large(matrix, SURELY_LARGE, space, team);
    team.barrier();
    for (;;) {
      const int exponent = reduce(rows, space.precision, space, team);
      if (team.rank() == 0) {
        space.lap(REDUCTION);
        space.trust = measure_reduced(matrix, stage, space.precision, exponent, space, out);
        space.repeat = space.trust == TRUSTED_PRODUCT && space.precision == STAGE_FP32;
        space.look = space.repeat && !space.taken.looked;
      }
      team.barrier();
      if (!space.repeat) break;
      if (space.look) take_off_large(matrix, SOME_LARGE, space, team);
      if (team.rank() == 0 && (!space.look || space.taken.count == 0)) space.precision = STAGE_FP64;
      team.barrier();
    }
    if (space.trust == TRUSTED || stage == STAGE_FP64) break;
  }
  team.barrier();
}

}  // namespace

void measure(const MatrixView* matrices, int count, int threads, double* out, double* seconds,
             WantedValues wanted, double* const* values) {
  const auto output = [&](int i) -> Output {
    return {out + std::int64_t(i) * METRICS_FIELDS, wanted, wanted == NO_VALUES ? nullptr : values[i]};
  };
  std::vector<int> order;
  for (int i = 0; i < count; ++i) {
    if (rows_of(matrices[i]) > 0) {
      order.push_back(i);
    } else {
      write_metrics(out + std::int64_t(i) * METRICS_FIELDS, {0, 0.0, 0.0, 1.0, 0.0}, MEASURED, STAGE_FP64);
    }
  }
  // Shared ones first, then by cost; equal ones in the order given.
  const auto is_shared = [&](int i) { return rows_of(matrices[i]) >= SHARED_ROWS; };
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    if (is_shared(a) != is_shared(b)) return is_shared(a);
    const double costs[] = {cost_of(matrices[a]), cost_of(matrices[b])};
    return costs[0] != costs[1] ? costs[0] > costs[1] : a < b;
  });
  const int shared = int(std::count_if(order.begin(), order.end(), is_shared)), total = int(order.size());
  std::int64_t largest_shared = 0, largest_own = 0;
  for (int k = 0; k < total; ++k) {
    std::int64_t& largest = k < shared ? largest_shared : largest_own;
    largest = std::max(largest, rows_of(matrices[order[k]]));
  }
  // The first thread works in the shared space once the shared matrices are done.
  std::vector<Workspace> spaces;
  spaces.emplace_back(std::max(largest_shared, largest_own));
  for (int t = 1; t < threads; ++t) spaces.emplace_back(largest_own);
  // All values take products in fp64.
  Positions positions(matrices, count, wanted == ALL_VALUES ? 0 : SHARED_ROWS);

  Barrier meeting;
  std::atomic<int> next{shared};
  parallel(threads, shared > 0 ? threads : total, [&](int thread, int actual) {
    const ThreadTeam team(thread, actual, &meeting);
    for (int k = 0; k < shared; ++k) {
      measure_one(matrices[order[k]], nullptr, spaces[0], team, output(order[k]));
    }
    const ThreadTeam alone(0, 1, nullptr);
    for (int k; (k = next.fetch_add(1, std::memory_order_relaxed)) < total;) {
      const int i = order[k];
      measure_one(matrices[i], positions.packed(i), spaces[thread], alone, output(i));
      positions.done(i);
    }
  });
  if (seconds == nullptr) return;
  std::fill(seconds, seconds + MEASURE_PARTS, 0.0);
  for (const Workspace& space : spaces) {
    for (int part = 0; part < MEASURE_PARTS; ++part) seconds[part] += space.seconds[part];
  }
}

}  // namespace rmsgd
