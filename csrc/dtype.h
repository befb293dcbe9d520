// Element types of weights, buffers and gradients, each declared once.
#pragma once

#include "team.h"

// Every element type, in the order of rmsgd/element_types.py: its name in torch, its type here, the type of
// its arithmetic and of the buffer that goes with it, the bits of its significand, and its type code in
// DLPack.
// clang-format off
#define RMSGD_ELEMENT_TYPES(type)       \
  type(float32, float, float, 24, 2)    \
  type(float64, double, double, 53, 2)  \
  type(float16, Float16, float, 11, 2)  \
  type(bfloat16, BFloat16, float, 8, 4)
// clang-format on

namespace rmsgd {

struct Float16 {
  unsigned short bits;
};

struct BFloat16 {
  unsigned short bits;
};

#define RMSGD_NAME(name, Element, Buffer, digits, code) name,
enum class Dtype : int { RMSGD_ELEMENT_TYPES(RMSGD_NAME) };
#undef RMSGD_NAME

// The type of the arithmetic on such elements, and of the memory of past gradients that goes with them.
template <class Element>
struct BufferOf;

#define RMSGD_BUFFER(name, Element, Buffer, digits, code) \
  template <>                                             \
  struct BufferOf<Element> {                              \
    using type = Buffer;                                  \
  };
RMSGD_ELEMENT_TYPES(RMSGD_BUFFER)
#undef RMSGD_BUFFER

template <class Element>
struct DtypeOf;

#define RMSGD_DTYPE(name, Element, Buffer, digits, code) \
  template <>                                            \
  struct DtypeOf<Element> {                              \
    static constexpr Dtype value = Dtype::name;          \
  };
RMSGD_ELEMENT_TYPES(RMSGD_DTYPE)
#undef RMSGD_DTYPE

// Whether the arithmetic is wider than the elements. Gradients may then have its type too.
template <class Element>
RMSGD_FN constexpr bool is_narrow() {
  return sizeof(Element) < sizeof(typename BufferOf<Element>::type);
}

// A number that is no element type: the caller has not checked what it was given. Going on would read memory
// as what it is not.
[[noreturn]] RMSGD_FN void unknown_element_type() {
#ifdef __CUDA_ARCH__
  __trap();
#else
  __builtin_trap();
#endif
}

// What `visit` returns for the address as a pointer to elements of that type. `visit` is an object and not a
// lambda where CUDA compiles it: NVRTC 13.0 takes one with a parameter of type auto for code of the host.
template <class Visit>
RMSGD_FN constexpr auto with_elements(Dtype dtype, const void* address, const Visit& visit) {
  switch (dtype) {
#define RMSGD_CASE(name, Element, Buffer, digits, code) \
  case Dtype::name:                                     \
    return visit(static_cast<const Element*>(address));
    RMSGD_ELEMENT_TYPES(RMSGD_CASE)
#undef RMSGD_CASE
  }
  unknown_element_type();
}

// Bytes of an element.
RMSGD_FN constexpr int size_of(Dtype dtype) {
  switch (dtype) {
#define RMSGD_CASE(name, Element, Buffer, digits, code) \
  case Dtype::name:                                     \
    return int(sizeof(Element));
    RMSGD_ELEMENT_TYPES(RMSGD_CASE)
#undef RMSGD_CASE
  }
  unknown_element_type();
}

// Half the distance from 1 to the next number: 2^-bits of the significand.
RMSGD_FN constexpr double unit_roundoff(Dtype dtype) {
  switch (dtype) {
#define RMSGD_CASE(name, Element, Buffer, digits, code) \
  case Dtype::name:                                     \
    return 1.0 / double(1ull << digits);
    RMSGD_ELEMENT_TYPES(RMSGD_CASE)
#undef RMSGD_CASE
  }
  unknown_element_type();
}

// The type of the buffer that goes with a weight.
RMSGD_FN constexpr Dtype buffer_dtype(Dtype weight) {
  switch (weight) {
#define RMSGD_CASE(name, Element, Buffer, digits, code) \
  case Dtype::name:                                     \
    return DtypeOf<Buffer>::value;
    RMSGD_ELEMENT_TYPES(RMSGD_CASE)
#undef RMSGD_CASE
  }
  unknown_element_type();
}

}  // namespace rmsgd
