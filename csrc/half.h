// float16 and bfloat16 to float32 and back, for kernels compiled once per instruction set: by the
// instructions that there are for it, else as `element.h` does.
#pragma once

#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "element.h"

namespace rmsgd::RMSGD_ISA {

inline float float_of_bfloat16(uint16_t h) { return widen(BFloat16{h}); }

inline uint16_t bfloat16_of_float(float x) {
  BFloat16 h;
  narrow(x, h);
  return h.bits;
}

inline float float_of_float16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return widen(Float16{h});
#endif
}

inline uint16_t float16_of_float(float x) {
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  Float16 h;
  narrow(x, h);
  return h.bits;
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
