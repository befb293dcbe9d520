// Reads a tensor's memory, sizes and strides from its Python object without its library's headers:
// the C exchange table of DLPack 1.3, which torch >= 2.10 publishes on its tensor type.
// https://dmlc.github.io/dlpack/latest/c_api.html fixes the layout of these structures.
#pragma once

#include <Python.h>

#include <cstdint>

namespace rmsgd::dlpack {

struct Tensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t ndim;
  uint8_t type_code;  // 2 is IEEE floating point, 4 is bfloat16
  uint8_t type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major;
  uint32_t minor;
  const ExchangeTable* previous;
  void* allocate;
  void* export_owned;
  void* import_owned;
  int (*view)(void* object, Tensor* out);  // 0, or -1 with a Python exception set; owns nothing
  void* current_stream;
};

// The table of a tensor type, or null if it has none of this major version. It sets no exception.
inline const ExchangeTable* exchange_table(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  const void* found = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_XDECREF(capsule);
  PyErr_Clear();
  const ExchangeTable* table = static_cast<const ExchangeTable*>(found);
  while (table != nullptr && table->major != 1) table = table->previous;
  return table == nullptr || table->view == nullptr ? nullptr : table;
}

inline bool on_cpu(const Tensor& t) { return t.device_type == 1; }

inline void* data(const Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

inline int64_t numel(const Tensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

inline bool is_aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(data(t)) % (t.type_bits / 8u) == 0;
}

// Whether the elements fill their memory, in any order of the dimensions.
inline bool is_dense(const Tensor& t) {
  if (numel(t) == 0) return true;
  int64_t filled = 1;
  for (bool grew = true; grew;) {
    grew = false;
    for (int d = t.ndim - 1; d >= 0; --d) {
      if (t.shape[d] > 1 && t.strides[d] == filled) {
        filled *= t.shape[d];
        grew = true;
      }
    }
  }
  return filled == numel(t);
}

// Whether element i in the memory of one is the same element as element i of the other.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.strides[d] != b.strides[d])) return false;
  }
  return true;
}

}  // namespace rmsgd::dlpack
