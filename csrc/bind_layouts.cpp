// rmsgd._cpu.Layouts: whether the memory and layout of tensors is unchanged, in one call.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bind.h"
#include "dlpack.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace rmsgd {
namespace {

class Layouts {
 public:
  Layouts(py::type tensor_type, const py::list& tensors)
      : type_(std::move(tensor_type)),
        table_(dlpack::exchange_table(reinterpret_cast<PyTypeObject*>(type_.ptr()))) {
    if (table_ == nullptr) throw py::value_error("tensor_type: has no DLPack exchange table");
    for (const py::handle tensor : tensors) {
      if (!py::isinstance(tensor, type_)) throw py::type_error("tensors: expected tensors");
      const bool has_memory = read(tensor, [&](std::int64_t number) {
        known_.push_back(number);
        return true;
      });
      if (!has_memory) throw py::value_error("tensors: one has no memory of its own");
    }
  }

  // The tensors are given again at each call. If this object owned them, they and what they refer to would
  // stay alive, since the garbage collector cannot see into it.
  bool hold(const py::list& tensors) const {
    const std::int64_t *known = known_.data(), *const end = known + known_.size();
    for (const py::handle tensor : tensors) {
      if (!read(tensor, [&](std::int64_t number) { return known != end && number == *known++; }))
        return false;
    }
    return known == end;
  }

 private:
  // Gives `next` a tensor's address, device, dtype, rank, sizes and strides, one after the other. Returns
  // false if the tensor has none, or if `next` returns false.
  template <class Next>
  bool read(py::handle tensor, const Next& next) const {
    dlpack::Tensor t;
    if (!PyObject_TypeCheck(tensor.ptr(), reinterpret_cast<PyTypeObject*>(type_.ptr()))) return false;
    if (table_->view(tensor.ptr(), &t) != 0) {
      PyErr_Clear();
      return false;
    }
    for (const std::int64_t number :
         {reinterpret_cast<std::int64_t>(dlpack::data(t)), std::int64_t(t.device_type),
          std::int64_t(t.device_index), std::int64_t(t.type_code), std::int64_t(t.type_bits),
          std::int64_t(t.ndim)}) {
      if (!next(number)) return false;
    }
    for (const std::int64_t* numbers : {t.shape, t.strides}) {
      if (!std::all_of(numbers, numbers + t.ndim, next)) return false;
    }
    return true;
  }

  py::type type_;
  const dlpack::ExchangeTable* table_;
  std::vector<std::int64_t> known_;  // the numbers of all tensors
};

}  // namespace

void bind_layouts(py::module_& m) {
  py::class_<Layouts>(m, "Layouts")
      .def(py::init<py::type, const py::list&>(), "tensor_type"_a, "tensors"_a)
      .def("hold", &Layouts::hold, "tensors"_a);
}

}  // namespace rmsgd
