// float16 and bfloat16 to float32 and back, for kernels compiled once per instruction set.
//
// To float32 is exact; back rounds to nearest even, overflows to infinity and keeps NaN a NaN. The
// portable forms are branchless, so that the compiler vectorises the loops over them.
#pragma once

#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace rmsgd::RMSGD_ISA {

inline float float_of_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of_bfloat16(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }

inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline float float_of_float16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= uint32_t(0x7c00) << 13 ? magnitude | 0x7f800000 : finite;
  return float_of_bits(bits | uint32_t(h & 0x8000) << 16);
#endif
}

inline uint16_t float16_of_float(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bits_of_float(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  // 2^-14 and above: rebias the exponent and round. Below: adding 1/2 leaves the rounded
  // significand of the subnormal in the low bits. From 2^16 on: infinity or NaN.
  const uint32_t normal = (magnitude - (uint32_t(112) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return uint16_t((magnitude >= 0x47800000 ? special : finite) | (bits >> 16 & 0x8000));
#endif
}

inline void floats_of_bfloat16(const uint16_t* __restrict in, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_bfloat16(in[i]);
}

inline void bfloat16_of_floats(const float* __restrict in, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_of_float(in[i]);
}

inline void floats_of_float16(const uint16_t* __restrict in, int64_t n, float* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) out[i] = float_of_float16(in[i]);
}

inline void float16_of_floats(const float* __restrict in, int64_t n, uint16_t* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
#endif
  for (; i < n; ++i) out[i] = float16_of_float(in[i]);
}

}  // namespace rmsgd::RMSGD_ISA
