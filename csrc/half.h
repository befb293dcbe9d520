// Runs of narrow elements to float32 and back, for kernels compiled once per instruction set: by the
// compiler's vectors of one element's conversion, or by an overload where there are instructions for it.
#pragma once

#include <stdint.h>

#include "element.h"

namespace rmsgd::RMSGD_ISA {

template <class Element>
inline void widen_all(const Element* __restrict in, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}

template <class Element>
inline void narrow_all(const float* __restrict in, int64_t n, Element* __restrict out) {
  for (int64_t i = 0; i < n; ++i) narrow(in[i], out[i]);
}

inline void widen_all(const Float16* __restrict in, int64_t n, float* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
#pragma GCC unroll 4  // a loop of so few instructions is as fast as the place where it happens to lie
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(h));
  }
#endif
  for (; i < n; ++i) out[i] = widen(in[i]);
}

inline void narrow_all(const float* __restrict in, int64_t n, Float16* __restrict out) {
  int64_t i = 0;
#if defined(__F16C__)
#pragma GCC unroll 4  // a loop of so few instructions is as fast as the place where it happens to lie
  for (; i + 8 <= n; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), h);
  }
#endif
  for (; i < n; ++i) narrow(in[i], out[i]);
}

}  // namespace rmsgd::RMSGD_ISA
