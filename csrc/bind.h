// Checks and helpers that the parts of the CPU binding share.
#pragma once

#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <string>

#include "dtype.h"
#include "parallel.h"

namespace rmsgd {

using Pointer = std::uintptr_t;  // a data pointer as Python holds it

// Every element type's name, in the order of their numbers.
#define RMSGD_NAME(name, Element, Buffer, digits, code) #name,
inline constexpr const char* ELEMENT_TYPES[] = {RMSGD_ELEMENT_TYPES(RMSGD_NAME)};
#undef RMSGD_NAME

// The dtype of that name; raises ValueError for any other name.
inline Dtype dtype_of(const std::string& name) {
  std::string known;
  for (int k = 0; k < int(std::size(ELEMENT_TYPES)); ++k) {
    if (name == ELEMENT_TYPES[k]) return Dtype(k);
    known += (k == 0 ? "" : ", ") + std::string(ELEMENT_TYPES[k]);
  }
  throw pybind11::value_error("expected one of " + known + ", got " + name);
}

// Checks an address and a number of elements of that dtype behind it. Raises ValueError if it is null or
// misaligned, or if the end would lie outside the address space.
inline void check_memory(const char* name, Pointer address, Dtype dtype, std::int64_t numel) {
  const std::string start = std::string(name) + ": ";
  if (numel == 0) return;
  if (address == 0) throw pybind11::value_error(start + "a pointer is null");
  if (address % size_of(dtype) != 0) {
    throw pybind11::value_error(start + "a pointer is not a multiple of the element's size");
  }
  const std::uint64_t room = std::numeric_limits<std::int64_t>::max() - address;
  if (address > std::numeric_limits<std::int64_t>::max() || std::uint64_t(numel) > room / size_of(dtype)) {
    throw pybind11::value_error(start + "more elements than memory has addresses");
  }
}

// NumPy arrays may lie at any address.
inline void check_aligned(const char* name, const pybind11::array& array) {
  if (array.attr("flags").attr("aligned").cast<bool>()) return;
  throw pybind11::value_error(std::string(name) + ": not aligned in memory");
}

// The number of threads to use. Raises ValueError if it is below one.
inline int checked_threads(std::int64_t threads) {
  if (threads < 1) {
    throw pybind11::value_error("threads: expected at least 1, got " + std::to_string(threads));
  }
  return int(std::min<std::int64_t>(threads, MOST_THREADS));
}

// Takes the GIL back. If the interpreter has ended meanwhile, Python before 3.14 ends this thread by
// unwinding it through functions that forbid that, and the process would abort. So the thread waits for its
// end instead.
inline void take_gil_back(PyThreadState* state) {
#if defined(__GLIBCXX__)
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  PyEval_RestoreThread(state);
#endif
}

// Runs the work without the GIL.
template <class Work>
void without_gil(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  try {
    work();
  } catch (...) {
    take_gil_back(state);
    throw;
  }
  take_gil_back(state);
}

void bind_step(pybind11::module_& m);
void bind_layouts(pybind11::module_& m);

}  // namespace rmsgd
