// rmsgd._cpu.StepPlan: the fused momentum step for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "dlpack.h"
#include "sgd/plan.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace rmsgd {
namespace {

void expect_length(const char* name, std::size_t length, std::size_t expected) {
  if (length == expected) return;
  throw py::value_error(std::string(name) + ": expected one for each of the " + std::to_string(expected) +
                        " parameters, got " + std::to_string(length));
}

StepPlan make_plan(const std::vector<Pointer>& parameters, const std::vector<Pointer>& buffers,
                   const std::vector<std::string>& dtypes, const std::vector<std::int64_t>& numels,
                   const std::vector<std::int32_t>& groups, const std::vector<std::int64_t>& eta_indices,
                   const py::array_t<double, 0>& eta, py::array_t<bool, 0>& fresh) {
  const std::size_t n = parameters.size();
  expect_length("buffers", buffers.size(), n);
  expect_length("dtypes", dtypes.size(), n);
  expect_length("numels", numels.size(), n);
  expect_length("groups", groups.size(), n);
  expect_length("eta_indices", eta_indices.size(), n);
  if (eta.ndim() != 1) throw py::value_error("eta: expected one dimension");
  if (fresh.ndim() != 1) throw py::value_error("fresh: expected one dimension");
  check_aligned("eta", eta);
  expect_length("fresh", std::size_t(fresh.shape(0)), n);
  std::vector<StepTensor> tensors(n);
  for (std::size_t k = 0; k < n; ++k) {
    if (eta_indices[k] < 0 || eta_indices[k] >= eta.shape(0)) {
      throw py::index_error("eta_indices: " + std::to_string(eta_indices[k]) +
                            " is not an index of eta, which has " + std::to_string(eta.shape(0)) +
                            " elements");
    }
    if (groups[k] < 0) throw py::index_error("groups: an index is negative");
    StepTensor& tensor = tensors[k];
    tensor.dtype = dtype_of(dtypes[k]);
    if (numels[k] < 0) throw py::value_error("numels: a number of elements is negative");
    check_memory("parameters", parameters[k], tensor.dtype, numels[k]);
    if (buffers[k] != 0) check_memory("buffers", buffers[k], buffer_dtype(tensor.dtype), numels[k]);
    tensor.weight = reinterpret_cast<void*>(parameters[k]);
    tensor.buffer = reinterpret_cast<void*>(buffers[k]);
    tensor.gradient = nullptr;
    tensor.eta = eta.data(eta_indices[k]);
    tensor.fresh = fresh.mutable_data(py::ssize_t(k));
    tensor.numel = numels[k];
    tensor.group = groups[k];
    tensor.gradient_dtype = tensor.dtype;
  }
  return StepPlan(std::move(tensors));
}

// multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity
using GroupTuple = std::tuple<double, double, double, double, bool, bool, bool>;

// The hyper-parameters of a step, from arguments that have been checked.
std::vector<StepGroup> checked_groups(const StepPlan& plan, const std::vector<GroupTuple>& groups,
                                      double grad_scale) {
  if (!(grad_scale > 0) || std::isinf(grad_scale)) {
    throw py::value_error("grad_scale: expected a positive number, got " + std::to_string(grad_scale));
  }
  if (groups.size() < plan.groups()) {
    throw py::index_error("groups: a parameter has index " + std::to_string(plan.groups() - 1) + ", got " +
                          std::to_string(groups.size()) + " groups");
  }
  std::vector<StepGroup> result;
  result.reserve(groups.size());
  for (const auto& [multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity] : groups) {
    result.push_back({multiplier, momentum, dampening, weight_decay, nesterov, maximize, velocity});
  }
  return result;
}

// While one thread takes a step, which releases the GIL, no other may set the plan's gradients.
class SoleUse {
 public:
  explicit SoleUse(StepPlan& plan) : plan_(plan) {
    if (plan_.busy) throw std::runtime_error("another thread is taking a step of these parameters");
    plan_.busy = true;
  }
  ~SoleUse() { plan_.busy = false; }
  SoleUse(const SoleUse&) = delete;
  SoleUse& operator=(const SoleUse&) = delete;

 private:
  StepPlan& plan_;
};

// Whether kernels take gradients of this type for such weights: the weights' own type, or their arithmetic's.
bool goes_with(Dtype gradient, Dtype weight) {
  return gradient == weight || gradient == buffer_dtype(weight);
}

void step(StepPlan& plan, const std::vector<Pointer>& gradients, const std::vector<GroupTuple>& groups,
          double grad_scale, std::int64_t threads, const std::optional<std::vector<std::string>>& dtypes) {
  auto& tensors = plan.tensors();
  expect_length("gradients", gradients.size(), tensors.size());
  if (dtypes) expect_length("dtypes", dtypes->size(), tensors.size());
  const int used = checked_threads(threads);
  const auto step_groups = checked_groups(plan, groups, grad_scale);
  std::vector<Dtype> gradient_dtypes(tensors.size());
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    const Dtype dtype = gradient_dtypes[k] = dtypes ? dtype_of((*dtypes)[k]) : tensors[k].dtype;
    if (!goes_with(dtype, tensors[k].dtype)) {
      throw py::value_error("dtypes: " + std::to_string(k) + " is " + (*dtypes)[k] +
                            ", neither the parameter's nor float32 beside a narrower one");
    }
    if (gradients[k] == 0) continue;
    check_memory("gradients", gradients[k], dtype, tensors[k].numel);
    const auto memory = reinterpret_cast<const void*>(gradients[k]);
    if (plan.writes(memory, tensors[k].numel * size_of(dtype))) {
      throw py::value_error("gradients: " + std::to_string(k) +
                            " shares memory with a parameter or a buffer");
    }
  }
  const SoleUse sole(plan);
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    tensors[k].gradient = reinterpret_cast<const void*>(gradients[k]);
    tensors[k].gradient_dtype = gradient_dtypes[k];
  }
  without_gil([&] { plan.step(step_groups, grad_scale, used); });
}

std::optional<Dtype> dtype_of(const dlpack::Tensor& t) {
  if (t.type_lanes != 1) return std::nullopt;
#define RMSGD_CODE(name, Element, Buffer, digits, code) \
  if (t.type_code == code && t.type_bits == 8 * sizeof(Element)) return Dtype::name;
  RMSGD_ELEMENT_TYPES(RMSGD_CODE)
#undef RMSGD_CODE
  return std::nullopt;
}

// Whether a tensor is the negative of what its memory holds, which the exchange table does not tell.
bool is_lazily_negated(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Takes a parameter's gradient from the two Python objects. Returns false if they are not those that the plan
// was made for.
bool take_gradient(const dlpack::ExchangeTable& table, PyObject* parameter, PyObject* gradient,
                   const StepPlan& plan, StepTensor& tensor) {
  dlpack::Tensor w, g;
  if (table.view(parameter, &w) != 0 || table.view(gradient, &g) != 0) {  // not strided, for one
    PyErr_Clear();
    return false;
  }
  const auto gradient_dtype = dtype_of(g);
  const bool as_planned = dlpack::data(w) == tensor.weight && dlpack::numel(w) == tensor.numel &&
                          dtype_of(w) == tensor.dtype && dlpack::is_dense(w);
  const bool fits = dlpack::on_cpu(g) && dlpack::same_layout(w, g) && gradient_dtype &&
                    goes_with(*gradient_dtype, tensor.dtype);
  if (!as_planned || !fits || !dlpack::is_aligned(g)) return false;
  if (is_lazily_negated(gradient)) return false;
  if (plan.writes(dlpack::data(g), tensor.numel * size_of(*gradient_dtype))) return false;
  tensor.gradient = dlpack::data(g);
  tensor.gradient_dtype = *gradient_dtype;
  return true;
}

std::optional<std::vector<std::size_t>> step_tensors(StepPlan& plan, const py::type& tensor_type,
                                                     const py::list& parameters,
                                                     const std::vector<GroupTuple>& groups, double grad_scale,
                                                     std::int64_t threads) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  PyTypeObject* const type = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());
  const dlpack::ExchangeTable* const table = dlpack::exchange_table(type);
  auto& tensors = plan.tensors();
  expect_length("parameters", parameters.size(), tensors.size());
  const int used = checked_threads(threads);
  const auto step_groups = checked_groups(plan, groups, grad_scale);
  if (table == nullptr) return std::nullopt;
  const SoleUse sole(plan);

  std::vector<py::object> gradients;  // they keep the memory until the end, whatever other threads do
  gradients.reserve(tensors.size());
  std::vector<std::size_t> without;
  for (std::size_t k = 0; k < tensors.size(); ++k) {
    PyObject* const parameter = PyList_GetItem(parameters.ptr(), py::ssize_t(k));
    if (parameter == nullptr) throw py::error_already_set();
    const auto held = py::reinterpret_borrow<py::object>(parameter);  // reading `grad` may run Python
    if (!PyObject_TypeCheck(parameter, type)) throw py::type_error("parameters: expected tensors");
    PyObject* const gradient = PyObject_GetAttr(parameter, grad_name);
    if (gradient == nullptr) throw py::error_already_set();
    gradients.push_back(py::reinterpret_steal<py::object>(gradient));
    tensors[k].gradient = nullptr;
    if (gradient == Py_None) {
      without.push_back(k);
    } else if (Py_TYPE(gradient) != type || !take_gradient(*table, parameter, gradient, plan, tensors[k])) {
      return std::nullopt;
    }
  }
  without_gil([&] { plan.step(step_groups, grad_scale, used); });
  return without;
}

}  // namespace

void bind_step(py::module_& m) {
  py::class_<StepPlan>(m, "StepPlan")
      .def(py::init(&make_plan), "parameters"_a, "buffers"_a, "dtypes"_a, "numels"_a, "groups"_a,
           "eta_indices"_a, "eta"_a.noconvert(), "fresh"_a.noconvert(), py::keep_alive<1, 8>(),
           py::keep_alive<1, 9>())
      .def("step", &step, "gradients"_a, "groups"_a, "grad_scale"_a = 1.0, "threads"_a = 1,
           "dtypes"_a = py::none())
      .def("step_tensors", &step_tensors, "tensor_type"_a, "parameters"_a, "groups"_a, "grad_scale"_a = 1.0,
           "threads"_a = 1);
}

}  // namespace rmsgd
