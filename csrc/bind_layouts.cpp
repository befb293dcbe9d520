// rmsgd._cpu.Layouts: whether tensors are still where and what they were, in one call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
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
  Layouts(const py::type& tensor_type, std::vector<py::object> tensors)
      : table_(dlpack::exchange_table(reinterpret_cast<PyTypeObject*>(tensor_type.ptr()))),
        tensors_(std::move(tensors)),
        known_(tensors_.size()) {
    if (table_ == nullptr) throw py::value_error("tensor_type: has no DLPack exchange table");
    for (std::size_t k = 0; k < tensors_.size(); ++k) {
      if (!py::isinstance(tensors_[k], tensor_type)) throw py::type_error("tensors: expected tensors");
      if (!read(k, known_[k])) throw py::value_error("tensors: one has no memory of its own");
    }
  }

  bool hold() const {
    std::vector<std::int64_t> now;  // outside the loop for its memory
    for (std::size_t k = 0; k < tensors_.size(); ++k) {
      if (!read(k, now) || now != known_[k]) return false;
    }
    return true;
  }

 private:
  // Address, device, dtype, sizes and strides of tensor k as plain numbers; false where it has none.
  bool read(std::size_t k, std::vector<std::int64_t>& layout) const {
    dlpack::Tensor t;
    if (table_->view(tensors_[k].ptr(), &t) != 0) {
      PyErr_Clear();
      return false;
    }
    layout.assign({reinterpret_cast<std::int64_t>(dlpack::data(t)), t.device_type, t.device_index,
                   t.type_code, t.type_bits});
    layout.insert(layout.end(), t.shape, t.shape + t.ndim);
    layout.insert(layout.end(), t.strides, t.strides + t.ndim);
    return true;
  }

  const dlpack::ExchangeTable* table_;
  std::vector<py::object> tensors_;
  std::vector<std::vector<std::int64_t>> known_;
};

}  // namespace

void bind_layouts(py::module_& m) {
  py::class_<Layouts>(m, "Layouts")
      .def(py::init<py::type, std::vector<py::object>>(), "tensor_type"_a, "tensors"_a)
      .def("hold", &Layouts::hold);
}

}  // namespace rmsgd
