// A libFuzzer target: bytes become spectra and weights, what csrc makes of them has to make sense.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "evbmf/metrics.h"
#include "spectrum/measure.h"
#include "team_code.h"

namespace {

// What is left of the fuzzer's bytes, zeros after their end.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  template <class T>
  T take() {
    T value{};
    const std::size_t n = size_ < sizeof value ? size_ : sizeof value;
    if (n > 0) std::memcpy(&value, data_, n);
    data_ += n;
    size_ -= n;
    return value;
  }

  int between(int least, int most) { return least + take<std::uint16_t>() % (most - least + 1); }

  // A finite number of 1e-300 to 1e300, of few bytes, so that equal ones are common.
  double number() {
    const double significand = take<std::int16_t>() / 4096.0;
    return std::ldexp(significand, take<std::int8_t>() / 8 * (take<std::uint8_t>() % 4 == 0 ? 62 : 1));
  }

  bool empty() const { return size_ == 0; }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

// What does not hold is named, and ends the program.
#define require(...)                                                                 \
  do {                                                                               \
    if (!(__VA_ARGS__)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #__VA_ARGS__); \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

void require_sense(const double* row, int L, double M) {
  const double rank = row[rmsgd::RANK], noise = row[rmsgd::NOISE_VARIANCE];
  require(rank >= 0 && rank <= L && rank == std::floor(rank));
  require(noise >= 0.0);
  require(rank == 0 || row[rmsgd::STABLE_RANK] > 0.0);
  require(row[rmsgd::STABLE_RANK] <= 1.0 + 1e-12);
  require(row[rmsgd::CONDITION_NUMBER] >= 0.0 && row[rmsgd::CONDITION_NUMBER] <= 1.0);
  require(row[rmsgd::NUCLEAR] >= 0.0 && row[rmsgd::NUCLEAR] <= rank * (1.0 + 1e-12));
  if (L > 1 && noise > 0.0) require(rank * (1.0 + L / M) < L);
}

// Omega as its definition has it, no case left out.
double omega(const std::vector<double>& c, double noise, double M) {
  const rmsgd::Threshold threshold(double(c.size()), M);
  double sum = c.size() * std::log(noise);
  for (const double value : c) {
    const double x = value / noise;
    if (x <= threshold.x) {
      sum += x;
      continue;
    }
    const double alpha = threshold.alpha, tau = rmsgd::tau_of(x, alpha);
    sum += std::log1p(tau) + alpha * std::log1p(tau / alpha);
    sum += 1.0 + alpha + alpha / tau;  // x - tau, which cancels
  }
  return sum;
}

// No breakpoint, where Omega has its local minima or next to it, may lie below the minimum found.
void require_lowest(const std::vector<double>& c, const rmsgd::FreeEnergyMinimum& found, double M) {
  if (found.noise_variance == 0.0) return;
  const rmsgd::Threshold threshold(double(c.size()), M);
  for (const double value : c) {
    if (value < 1e-280) break;
    require(found.free_energy <=
            omega(c, value / threshold.x, M) + 1e-7 * (1.0 + std::fabs(found.free_energy)));
  }
}

void spectrum(Input& input) {
  const int L = input.between(1, 300);
  const double M = L + double(input.take<std::uint16_t>()) * (1 + input.take<std::uint8_t>());
  std::vector<double> gamma(L);
  for (double& value : gamma) value = input.empty() ? 0.0 : std::fabs(input.number());
  std::sort(gamma.begin(), gamma.end(), [](double a, double b) { return a > b; });
  rmsgd::Solo solo;
  std::vector<double> scratch(2 * L + 1);
  double row[rmsgd::METRICS_FIELDS];
  rmsgd::measure_singular_values(solo, gamma.data(), L, M, scratch.data(), row);
  require_sense(row, L, M);

  std::vector<double> c(L);
  for (int h = 0; h < L; ++h) {
    const double scaled = gamma[0] > 0.0 ? gamma[h] / gamma[0] : 0.0;
    c[h] = scaled * scaled / M;
  }
  if (c[0] > 0.0) {
    const auto minimum = rmsgd::minimise_free_energy(solo, c.data(), L, 0.0, L, M, INFINITY, scratch.data());
    require(minimum.rank >= 0);
    require_lowest(c, minimum, M);
  }
}

// What lies in memory as the dtype, from a number.
void put(rmsgd::Dtype dtype, double value, std::vector<char>& memory, std::size_t at) {
  const float single = float(value);
  std::uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  const std::uint16_t upper = std::uint16_t(bits >> 16);  // of bfloat16; as float16 it is another number
  switch (dtype) {
    case rmsgd::Dtype::float64:
      std::memcpy(&memory[at * 8], &value, 8);
      break;
    case rmsgd::Dtype::float32:
      std::memcpy(&memory[at * 4], &single, 4);
      break;
    default:
      std::memcpy(&memory[at * 2], &upper, 2);
  }
}

// A weight of any shape and strides, in memory that ends where the last of its elements does.
void weight(Input& input) {
  const auto dtype = rmsgd::Dtype(input.take<std::uint8_t>() % 4);
  const int most = input.take<std::uint8_t>() % 8 == 0 ? 70 : 12;
  std::int64_t sizes[4], strides[4], elements = 1;
  for (std::int64_t& size : sizes) size = 1;
  sizes[0] = input.between(1, most);
  sizes[1] = input.between(1, most);
  sizes[2] = input.between(1, 4);
  sizes[3] = input.between(1, 4);
  const int order = input.take<std::uint8_t>(), gap = input.between(1, 3);
  for (int k = 0; k < 4; ++k) {
    const int d = (k + order) % 4;
    strides[d] = elements * gap;
    elements *= sizes[d];
  }
  if (input.take<std::uint8_t>() % 16 == 0) strides[0] = 0;
  std::int64_t last = 0;
  for (int d = 0; d < 4; ++d) last += (sizes[d] - 1) * strides[d];
  const int bytes = dtype == rmsgd::Dtype::float64 ? 8 : dtype == rmsgd::Dtype::float32 ? 4 : 2;
  std::vector<char> memory(std::size_t(last + 1) * bytes);
  for (std::int64_t at = 0; at <= last; ++at) {
    put(dtype, input.empty() ? double(at * 2654435761u % 1000) : input.number(), memory, std::size_t(at));
  }
  rmsgd::Side rows = {{sizes[0], 1, 1, 1}, {strides[0], 0, 0, 0}};
  rmsgd::Side columns = {{sizes[1], sizes[2], sizes[3], 1}, {strides[1], strides[2], strides[3], 0}};
  if (rows.length() > columns.length()) std::swap(rows, columns);
  const rmsgd::MatrixView view = {memory.data(), dtype, rows, columns};
  double row[rmsgd::METRICS_FIELDS];
  rmsgd::measure(&view, 1, 1, row);
  if (row[rmsgd::STATUS] == rmsgd::MEASURED) {
    require_sense(row, int(rows.length()), double(columns.length()));
  }
}

// The way of the GPU's guard: singular values without a Gram matrix, by a team of one.
void decomposition(Input& input) {
  const int L = input.between(2, 24), M = L + input.between(0, 40);
  std::vector<double> A(std::size_t(L) * M);
  double squares = 0.0;
  for (double& value : A) {
    value = input.empty() ? 0.0 : std::fmod(input.number(), 8.0);
    squares += value * value;
  }
  std::vector<double> gamma(L), scratch(rmsgd::singular_values_scratch(L));
  std::vector<int> counts(rmsgd::singular_values_counts(L, 1));
  rmsgd::Solo solo;
  const auto element = [&](long long column, int at) { return A[at * M + column]; };
  rmsgd::singular_values(solo, element, L, M, gamma.data(), scratch.data(), counts.data());
  double found = 0.0;
  for (int h = 0; h < L; ++h) {
    require(gamma[h] >= 0.0 && (h == 0 || gamma[h] <= gamma[h - 1]));
    found += gamma[h] * gamma[h];
  }
  require(std::fabs(found - squares) <= 1e-11 * squares + 1e-280);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  switch (input.take<std::uint8_t>() % 4) {
    case 0:
      weight(input);
      break;
    case 1:
      decomposition(input);
      break;
    default:
      spectrum(input);
  }
  return 0;
}
