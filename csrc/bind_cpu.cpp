// rmsgd._cpu: the CPU kernels for Python, in terms of pointers, sizes and plain numbers.
// rmsgd/_cpu.pyi says what each takes, gives and raises.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "sgd/plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Pointer = std::uintptr_t;

rmsgd::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return rmsgd::Dtype::float32;
  if (name == "float64") return rmsgd::Dtype::float64;
  if (name == "float16") return rmsgd::Dtype::float16;
  if (name == "bfloat16") return rmsgd::Dtype::bfloat16;
  throw py::value_error("dtypes: expected float32, float64, float16 or bfloat16, got " + name);
}

void expect_length(const char* name, std::size_t length, std::size_t expected) {
  if (length == expected) return;
  throw py::value_error(std::string(name) + ": expected one for each of the " + std::to_string(expected) +
                        " parameters, got " + std::to_string(length));
}

// multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity
using GroupTuple = std::tuple<double, double, double, double, bool, bool, bool>;

rmsgd::StepPlan make_step_plan(const std::vector<Pointer>& parameters, const std::vector<Pointer>& buffers,
                               const std::vector<std::string>& dtypes,
                               const std::vector<std::int64_t>& numels,
                               const std::vector<std::int32_t>& groups,
                               const std::vector<std::int64_t>& eta_indices,
                               const py::array_t<double, 0>& eta, py::array_t<bool, 0>& fresh) {
  const std::size_t n = parameters.size();
  expect_length("buffers", buffers.size(), n);
  expect_length("dtypes", dtypes.size(), n);
  expect_length("numels", numels.size(), n);
  expect_length("groups", groups.size(), n);
  expect_length("eta_indices", eta_indices.size(), n);
  if (eta.ndim() != 1) throw py::value_error("eta: expected one dimension");
  if (fresh.ndim() != 1) throw py::value_error("fresh: expected one dimension");
  expect_length("fresh", std::size_t(fresh.shape(0)), n);
  std::vector<rmsgd::StepTensor> tensors(n);
  for (std::size_t k = 0; k < n; ++k) {
    if (eta_indices[k] < 0 || eta_indices[k] >= eta.shape(0)) {
      throw py::index_error("eta_indices: " + std::to_string(eta_indices[k]) +
                            " is not an index of eta, which has " + std::to_string(eta.shape(0)) +
                            " elements");
    }
    if (groups[k] < 0) throw py::index_error("groups: an index is negative");
    if (numels[k] < 0) throw py::value_error("numels: a number of elements is negative");
    if (numels[k] > 0 && parameters[k] == 0) throw py::value_error("parameters: a pointer is null");
    rmsgd::StepTensor& tensor = tensors[k];
    tensor.weight = reinterpret_cast<void*>(parameters[k]);
    tensor.buffer = reinterpret_cast<void*>(buffers[k]);
    tensor.gradient = nullptr;
    tensor.eta = eta.data(eta_indices[k]);
    tensor.fresh = fresh.mutable_data(py::ssize_t(k));
    tensor.numel = numels[k];
    tensor.group = groups[k];
    tensor.dtype = dtype_of(dtypes[k]);
    tensor.gradient_dtype = tensor.dtype;
  }
  return rmsgd::StepPlan(std::move(tensors));
}

void step(rmsgd::StepPlan& plan, const std::vector<Pointer>& gradients, const std::vector<GroupTuple>& groups,
          double grad_scale, int threads) {
  auto& tensors = plan.tensors();
  expect_length("gradients", gradients.size(), tensors.size());
  if (!(grad_scale > 0) || std::isinf(grad_scale)) {
    throw py::value_error("grad_scale: expected a positive number, got " + std::to_string(grad_scale));
  }
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  std::vector<rmsgd::StepGroup> shared;
  shared.reserve(groups.size());
  for (const auto& [multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity] : groups) {
    shared.push_back({multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity});
  }
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    if (std::size_t(tensors[k].group) >= groups.size()) {
      throw py::index_error("groups: a parameter has index " + std::to_string(tensors[k].group) + ", got " +
                            std::to_string(groups.size()) + " groups");
    }
    tensors[k].gradient = reinterpret_cast<const void*>(gradients[k]);
  }
  py::gil_scoped_release unlocked;
  plan.step(shared, grad_scale, threads);
}

void bind_step(py::module_& m) {
  py::class_<rmsgd::StepPlan>(m, "StepPlan")
      .def(py::init(&make_step_plan), "parameters"_a, "buffers"_a, "dtypes"_a, "numels"_a, "groups"_a,
           "eta_indices"_a, "eta"_a.noconvert(), "fresh"_a.noconvert(), py::keep_alive<1, 8>(),
           py::keep_alive<1, 9>())
      .def("step", &step, "gradients"_a, "groups"_a, "grad_scale"_a = 1.0, "threads"_a = 1);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The CPU kernels of rmsgd.";
  bind_step(m);
}
