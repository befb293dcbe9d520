// What the parts of the CPU binding share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "dtype.h"

namespace rmsgd {

using Pointer = std::uintptr_t;  // a data pointer as Python holds it

// The dtype of that name; raises ValueError for any other name.
inline Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw pybind11::value_error("expected float32, float64, float16 or bfloat16, got " + name);
}

void bind_step(pybind11::module_& m);

}  // namespace rmsgd
