// rmsgd._cpu: the CPU kernels for Python, in terms of pointers, sizes and plain numbers.
// rmsgd/_cpu.pyi says what each takes, gives and raises.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "evbmf/metrics.h"
#include "evbmf/rates.h"
#include "isa.h"
#include "spectrum/measure.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using rmsgd::dtype_of;
using rmsgd::Pointer;

// -- spectra and EVBMF -------------------------------------------------------------------------

using Shape = std::vector<std::int64_t>;
// pointer, dtype, sizes and strides of the smaller side, sizes and strides of the larger side
using MatrixTuple = std::tuple<Pointer, std::string, Shape, Shape, Shape, Shape>;

// Joins neighbouring dimensions that are contiguous in memory.
rmsgd::Side side_of(const Shape& sizes, const Shape& strides) {
  if (sizes.size() != strides.size()) throw py::value_error("matrices: sizes and strides differ in number");
  rmsgd::Side side = {{1, 1, 1, 1}, {0, 0, 0, 0}};
  int last = -1;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] < 1) throw py::value_error("matrices: a size is below 1");
    if (sizes[d] == 1) continue;
    std::int64_t span, joined;
    if (last >= 0 && !__builtin_mul_overflow(strides[d], sizes[d], &span) && side.stride[last] == span &&
        !__builtin_mul_overflow(side.size[last], sizes[d], &joined)) {
      side.size[last] = joined;
      side.stride[last] = strides[d];
      continue;
    }
    if (++last == 4) throw py::value_error("matrices: a side has more than four dimensions");
    side.size[last] = sizes[d];
    side.stride[last] = strides[d];
  }
  return side;
}

// The number of elements of a side, and the distance of the last one from the first, in elements. Throws if
// they exceed what a Gram matrix or an address can have.
struct Reach {
  std::int64_t length = 1, before = 0, after = 0;
};

Reach reach_of(const rmsgd::Side& side, std::int64_t most) {
  Reach reach;
  for (int d = 0; d < 4; ++d) {
    std::int64_t step;
    std::int64_t& end = side.stride[d] < 0 ? reach.before : reach.after;
    if (__builtin_mul_overflow(reach.length, side.size[d], &reach.length) || reach.length > most) {
      throw py::value_error("matrices: a side is longer than " + std::to_string(most));
    }
    if (__builtin_mul_overflow(side.size[d] - 1, side.stride[d], &step) ||
        __builtin_add_overflow(end, step, &end)) {
      throw py::value_error("matrices: more elements than memory has addresses");
    }
  }
  return reach;
}

// The Gram matrix of the smaller side has to be addressable, with room to spare.
constexpr std::int64_t MOST_ROWS = std::int64_t(1) << 24;
constexpr std::int64_t MOST_COLUMNS = std::int64_t(1) << 48;

void check_matrix(const rmsgd::MatrixView& view, Pointer data) {
  const Reach small = reach_of(view.small, MOST_ROWS), large = reach_of(view.large, MOST_COLUMNS);
  if (small.length > large.length) throw py::value_error("matrices: the smaller side is the longer one");
  std::int64_t after, before;
  if (__builtin_add_overflow(small.after, large.after, &after) ||
      __builtin_add_overflow(small.before, large.before, &before) ||
      after == std::numeric_limits<std::int64_t>::max()) {
    throw py::value_error("matrices: more elements than memory has addresses");
  }
  rmsgd::check_memory("matrices", data, view.dtype, after + 1);
  if (before < 0 && Pointer(-(before + 1)) >= data / rmsgd::size_of(view.dtype)) {
    throw py::value_error("matrices: more elements than memory has addresses");
  }
}

std::vector<rmsgd::MatrixView> views_of(const std::vector<MatrixTuple>& matrices) {
  std::vector<rmsgd::MatrixView> views;
  views.reserve(matrices.size());
  for (const auto& [data, dtype, small_sizes, small_strides, large_sizes, large_strides] : matrices) {
    views.push_back({reinterpret_cast<const void*>(data), dtype_of(dtype),
                     side_of(small_sizes, small_strides), side_of(large_sizes, large_strides)});
    check_matrix(views.back(), data);
  }
  rmsgd::active_isa();  // throws here rather than on a thread
  return views;
}

std::pair<py::array_t<double>, py::array_t<double>> measure_parts(const std::vector<MatrixTuple>& matrices,
                                                                  std::int64_t threads) {
  const int used = rmsgd::checked_threads(threads);
  const std::vector<rmsgd::MatrixView> views = views_of(matrices);
  py::array_t<double> table({py::ssize_t(views.size()), py::ssize_t(rmsgd::METRICS_FIELDS)});
  py::array_t<double> parts(std::vector<py::ssize_t>{rmsgd::MEASURE_PARTS});
  double* out = table.mutable_data();
  double* seconds = parts.mutable_data();
  rmsgd::without_gil([&] { rmsgd::measure(views.data(), int(views.size()), used, out, seconds); });
  return {table, parts};
}

py::array_t<double> measure(const std::vector<MatrixTuple>& matrices, std::int64_t threads) {
  return measure_parts(matrices, threads).first;
}

rmsgd::WantedValues wanted_values(const std::string& name) {
  if (name == "top") return rmsgd::KEPT_VALUES;
  if (name == "half") return rmsgd::HALF_VALUES;
  if (name == "bulk") return rmsgd::BULK_VALUES;
  if (name == "all") return rmsgd::ALL_VALUES;
  throw py::value_error("values: expected top, half, bulk or all, got " + name);
}

std::pair<py::array_t<double>, py::array_t<double>> spectra(const std::vector<MatrixTuple>& matrices,
                                                            const std::string& values, std::int64_t threads) {
  const int used = rmsgd::checked_threads(threads);
  const rmsgd::WantedValues wanted = wanted_values(values);
  const std::vector<rmsgd::MatrixView> views = views_of(matrices);
  std::int64_t total = 0;
  for (const rmsgd::MatrixView& view : views) total += view.small.length();
  py::array_t<double> table({py::ssize_t(views.size()), py::ssize_t(rmsgd::METRICS_FIELDS)});
  py::array_t<double> gamma(std::vector<py::ssize_t>{py::ssize_t(total)});
  double* const out = table.mutable_data();
  double* next = gamma.mutable_data();
  std::fill(next, next + total, 0.0);
  std::vector<double*> places;
  for (const rmsgd::MatrixView& view : views) {
    places.push_back(next);
    next += view.small.length();
  }
  rmsgd::without_gil(
      [&] { rmsgd::measure(views.data(), int(views.size()), used, out, nullptr, wanted, places.data()); });
  return {table, gamma};
}

py::array_t<double> measure_spectrum(const py::array_t<double, py::array::c_style>& gamma, std::int64_t M) {
  if (gamma.ndim() != 1 || gamma.shape(0) < 1)
    throw py::value_error("gamma: expected one dimension, not empty");
  rmsgd::check_aligned("gamma", gamma);
  if (gamma.shape(0) > MOST_ROWS) throw py::value_error("gamma: too many singular values");
  const int L = int(gamma.shape(0));
  if (M < L) throw py::value_error("M: expected at least the number of singular values");
  py::array_t<double> row(std::vector<py::ssize_t>{rmsgd::METRICS_FIELDS});
  double* out = row.mutable_data();
  const double* values = gamma.data();
  for (int h = 0; h < L; ++h) {
    const double most = h > 0 ? values[h - 1] : std::numeric_limits<double>::max();
    if (values[h] >= 0.0 && values[h] <= most) continue;
    throw py::value_error("gamma: expected finite numbers, descending, none below zero");
  }
  std::vector<double> scratch(2 * std::size_t(L) + 1);
  rmsgd::without_gil([&] {
    rmsgd::Solo team;
    rmsgd::measure_singular_values(team, values, L, double(M), scratch.data(), out);
  });
  return row;
}

// -- learning rates ----------------------------------------------------------------------------

// initial_lr, beta, zeta, decay, floor, anchor, lowest, highest, column, holds, rule, first
using RateTuple =
    std::tuple<double, double, double, double, double, double, double, double, int, bool, int, bool>;

template <class T>
using Table = py::array_t<T, py::array::c_style>;

// Checks that all arrays are aligned and that none shares memory with another.
void expect_apart(std::vector<std::pair<const char*, py::array>> arrays) {
  for (const auto& [name, array] : arrays) rmsgd::check_aligned(name, array);
  std::sort(arrays.begin(), arrays.end(),
            [](const auto& a, const auto& b) { return a.second.data() < b.second.data(); });
  const char* end = nullptr;
  for (const auto& [name, array] : arrays) {
    if (array.nbytes() == 0) continue;
    const char* const begin = static_cast<const char*>(array.data());
    if (begin < end) throw py::value_error(std::string(name) + ": shares memory with another argument");
    end = begin + array.nbytes();
  }
}

void update_rates(const Table<int>& parameter, const Table<int>& group, const Table<int>& spectrum_begin,
                  const Table<double>& weight, Table<double>& stable_rank, Table<int>& ready,
                  Table<double>& unbounded, Table<double>& eta, const Table<int>& follower,
                  const Table<int>& leader, const Table<int>& follower_group,
                  const std::vector<RateTuple>& groups, const Table<double>& metrics) {
  expect_apart({{"parameter", parameter},
                {"group", group},
                {"spectrum_begin", spectrum_begin},
                {"weight", weight},
                {"stable_rank", stable_rank},
                {"ready", ready},
                {"unbounded", unbounded},
                {"eta", eta},
                {"follower", follower},
                {"leader", leader},
                {"follower_group", follower_group},
                {"metrics", metrics}});
  const std::size_t layers = std::size_t(parameter.size());
  const auto expect = [](const char* name, std::size_t size, std::size_t expected) {
    if (size == expected) return;
    throw py::value_error(std::string(name) + ": expected " + std::to_string(expected) + " entries, got " +
                          std::to_string(size));
  };
  const auto expect_indices = [](const char* name, const Table<int>& indices, std::int64_t least,
                                 std::int64_t end) {
    for (py::ssize_t i = 0; i < indices.size(); ++i) {
      if (indices.data()[i] >= least && indices.data()[i] < end) continue;
      throw py::index_error(std::string(name) + ": " + std::to_string(indices.data()[i]) +
                            " is out of range");
    }
  };
  expect("group", group.size(), layers);
  expect("spectrum_begin", spectrum_begin.size(), layers + 1);
  expect("stable_rank", stable_rank.size(), layers);
  expect("ready", ready.size(), layers);
  expect("unbounded", unbounded.size(), layers);
  expect("leader", leader.size(), follower.size());
  expect("follower_group", follower_group.size(), follower.size());
  expect("metrics", metrics.size(), weight.size() * rmsgd::METRICS_FIELDS);
  expect_indices("parameter", parameter, 0, eta.size());
  expect_indices("group", group, 0, std::int64_t(groups.size()));
  expect_indices("spectrum_begin", spectrum_begin, 0, weight.size() + 1);
  expect_indices("follower", follower, 0, eta.size());
  expect_indices("leader", leader, rmsgd::NO_LEADER, std::int64_t(layers));
  expect_indices("follower_group", follower_group, 0, std::int64_t(groups.size()));

  std::vector<rmsgd::RateGroup> rate_groups;
  const auto expect_number = [](const char* name, int number, int end) {
    if (number >= 0 && number < end) return;
    throw py::value_error(std::string("groups: expected a ") + name + " from 0 to " +
                          std::to_string(end - 1) + ", got " + std::to_string(number));
  };
  for (const auto& [initial_lr, beta, zeta, decay, floor, anchor, lowest, highest, column, holds, rule,
                    first] : groups) {
    expect_number("column", column, rmsgd::METRICS_FIELDS);
    expect_number("rule", rule, rmsgd::RATE_RULES);
    rate_groups.push_back(
        {initial_lr, beta, zeta, decay, floor, anchor, lowest, highest, column, holds, rule, first});
  }
  const rmsgd::RateTables tables = {int(layers),
                                    parameter.data(),
                                    group.data(),
                                    spectrum_begin.data(),
                                    weight.data(),
                                    rate_groups.data(),
                                    stable_rank.mutable_data(),
                                    ready.mutable_data(),
                                    unbounded.mutable_data(),
                                    eta.mutable_data(),
                                    int(follower.size()),
                                    follower.data(),
                                    leader.data(),
                                    follower_group.data()};
  std::vector<double> measured(layers);
  std::vector<int> held(layers);
  rmsgd::Solo team;
  rmsgd::update_rates(team, tables, metrics.data(), measured.data(), held.data());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels of rmsgd.";
  rmsgd::bind_step(m);
  rmsgd::bind_layouts(m);
  m.def("measure", &measure, "matrices"_a, "threads"_a = 1);
  m.def("measure_parts", &measure_parts, "matrices"_a, "threads"_a = 1);
  m.def("spectra", &spectra, "matrices"_a, "values"_a, "threads"_a = 1);
  m.def("measure_spectrum", &measure_spectrum, "gamma"_a.noconvert(), "M"_a);
  m.def("update_rates", &update_rates, "parameter"_a.noconvert(), "group"_a.noconvert(),
        "spectrum_begin"_a.noconvert(), "weight"_a.noconvert(), "stable_rank"_a.noconvert(),
        "ready"_a.noconvert(), "unbounded"_a.noconvert(), "eta"_a.noconvert(), "follower"_a.noconvert(),
        "leader"_a.noconvert(), "follower_group"_a.noconvert(), "groups"_a, "metrics"_a.noconvert());
  m.def("element_types", [] {
    return std::vector<std::string>(std::begin(rmsgd::ELEMENT_TYPES), std::end(rmsgd::ELEMENT_TYPES));
  });
  m.def("isa", [] { return rmsgd::isa_name(rmsgd::active_isa()); });
}
