// exp2 and exp. Coefficients are minimax fits; the measured error of exp2v is at most 2 ulp, that of log2_chains
// at most 2.5e-7 of its value (python_tests/csrc/test_cpu_math.py).
#pragma once

#include "simd.h"

namespace klflow::KLFLOW_ISA {

KLFLOW_INLINE vf round_even(vf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), 8));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_round_ps(reinterpret_cast<__m256>(x), 8));
#else
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23
  return (x + magic) - magic;
#endif
}

KLFLOW_INLINE vf round_down(vf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), 9));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_round_ps(reinterpret_cast<__m256>(x), 9));
#else
  return round_even(x -
                    0.5f);  // of x in [n, n + 1): n, or n + 1 in the last places, where the polynomial is at home too
#endif
}

// p * 2^n for integer-valued n in [-252, 252], gradual underflow included.
KLFLOW_INLINE vf scale_by_power(vf p, vf n) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const vi whole = __builtin_convertvector(n, vi);
  const vi half = whole >> 1;
  return p * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
#endif
}

// 2^x for x <= 126; 0 where 2^x < 2^-124, NaN stays, 2^0 = 1.
KLFLOW_INLINE vf exp2v(vf x) {
#if defined(__AVX512F__)
  x = maximum(splat(-200.0f), x);
#else
  const vi tiny = x < -124.0f;
  x = tiny ? splat(-124.0f) : x;
#endif
  const vf n = round_even(x);
  const vf r = x - n;
  vf p = splat(0.00015353360703324886f);
  p = p * r + 0.0013398874943806084f;
  p = p * r + 0.009618437366753212f;
  p = p * r + 0.05550332469509154f;
  p = p * r + 0.24022647913491618f;
  p = p * r + 0.6931472028560484f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return scale_by_power(p, n);
#else
  return as_float((as_int(p) + (__builtin_convertvector(n, vi) << 23)) & ~tiny);
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
KLFLOW_INLINE vf expv(vf x) { return exp2v(x * kLog2E); }  // x <= 87, as exp2v
constexpr double kLn2 = 0.69314718055994531;

}  // namespace klflow::KLFLOW_ISA
