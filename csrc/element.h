// Elements of weights and gradients: float16 and bfloat16 to float32 and back, which the arithmetic is in,
// and how CUDA kernels load and store them, 16 bytes per access.
#pragma once

#include "dtype.h"
#include "team.h"

#ifndef __CUDACC_RTC__
#ifdef __F16C__
#include <immintrin.h>
#endif
#endif

namespace rmsgd {

RMSGD_FN float float_of_word(unsigned word) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(word);
#else
  float x;
  __builtin_memcpy(&x, &word, sizeof x);
  return x;
#endif
}

RMSGD_FN unsigned word_of_float(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  unsigned word;
  __builtin_memcpy(&word, &x, sizeof word);
  return word;
#endif
}

RMSGD_FN unsigned long long word_of_double(double x) {
#ifdef __CUDA_ARCH__
  return (unsigned long long)__double_as_longlong(x);
#else
  unsigned long long word;
  __builtin_memcpy(&word, &x, sizeof word);
  return word;
#endif
}

RMSGD_FN float widen(float x) { return x; }
RMSGD_FN double widen(double x) { return x; }
RMSGD_FN float widen(BFloat16 x) { return float_of_word(unsigned(x.bits) << 16); }

// What no instruction does is without branches, so that loops over it are vectorised.
RMSGD_FN float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#elif defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const unsigned magnitude = (x.bits & 0x7fffu) << 13;
  const unsigned finite = word_of_float(float_of_word(magnitude) * 0x1p112f);
  const unsigned word = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;
  return float_of_word(word | (x.bits & 0x8000u) << 16);
#endif
}

// Rounds to nearest even, from what is too large to infinity; a NaN stays one.
RMSGD_FN void narrow(float x, float& to) { to = x; }
RMSGD_FN void narrow(double x, double& to) { to = x; }

RMSGD_FN void narrow(float x, BFloat16& to) {
  const unsigned word = word_of_float(x);
  const unsigned rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  to.bits = (unsigned short)((word & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

RMSGD_FN void narrow(float x, Float16& to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#elif defined(__F16C__)
  to.bits = (unsigned short)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const unsigned word = word_of_float(x), magnitude = word & 0x7fffffffu;
  // 2^-14 and above: rebias the exponent and round. Below: adding 1/2 leaves the rounded
  // significand of the subnormal in the low bits. From 2^16 on: infinity or NaN.
  const unsigned normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const unsigned subnormal = word_of_float(float_of_word(magnitude) + 0.5f) - 0x3f000000u;
  const unsigned special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const unsigned finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = (unsigned short)((magnitude >= 0x47800000u ? special : finite) | (word >> 16 & 0x8000u));
#endif
}

// `count` neighbouring elements, moved in one access (or in accesses of 16 bytes) when aligned to 16 bytes.
// On a CPU a copy suits every address: out of the two ways below GCC 14 makes the aligned one, always.
template <class T, int count>
struct alignas(16) Pack {
  T value[count];

  RMSGD_FN static bool fits(const T* address) { return (unsigned long long)address % 16 == 0; }

  RMSGD_FN void load(const T* from, bool aligned) {
#ifdef __CUDA_ARCH__
    if (aligned) {
      *this = *reinterpret_cast<const Pack*>(from);
    } else {
      for (int i = 0; i < count; ++i) value[i] = from[i];
    }
#else
    if (aligned && !fits(from)) __builtin_trap();
    __builtin_memcpy(value, from, sizeof value);
#endif
  }

  RMSGD_FN void store(T* to, bool aligned) const {
#ifdef __CUDA_ARCH__
    if (aligned) {
      *reinterpret_cast<Pack*>(to) = *this;
    } else {
      for (int i = 0; i < count; ++i) to[i] = value[i];
    }
#else
    if (aligned && !fits(to)) __builtin_trap();
    __builtin_memcpy(to, value, sizeof value);
#endif
  }
};

}  // namespace rmsgd
