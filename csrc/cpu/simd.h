// One vector of the instruction set this translation unit is compiled for (GCC vector extensions plus a few
// intrinsics): loads and stores of the three dtypes, exp, log2, and Philox words. Everything lives in a namespace named
// after the instruction set, so that no AVX-512 code can leak into another unit through the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../common/params.h"
#include "../common/philox.h"

#ifndef KLFLOW_ISA
#error "compile with -DKLFLOW_ISA=baseline|avx2|avx512"
#endif

#define KLFLOW_INLINE inline __attribute__((always_inline))

namespace klflow::KLFLOW_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint64_t vu64 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

KLFLOW_INLINE vf splat(float x) { return x - vf{}; }
KLFLOW_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
KLFLOW_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }

// ---- loads and stores: float32, bfloat16 (round to nearest even), float16
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class V, class T>
KLFLOW_INLINE V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
KLFLOW_INLINE vf load(const float* p) { return load_raw<vf>(p); }
KLFLOW_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

KLFLOW_INLINE vf load(const bf16* p) {
  const vu wide = __builtin_convertvector(load_raw<vh>(p), vu);
  return as_float(reinterpret_cast<vi>(wide << 16));
}
KLFLOW_INLINE void store(bf16* p, vf v) {
  const vu bits = reinterpret_cast<vu>(v);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vi number = v == v;
  const vu out = (rounded & reinterpret_cast<vu>(number)) | (0x7fc0u & ~reinterpret_cast<vu>(number));
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(out));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(out), reinterpret_cast<__m256i>(out));
  const __m128i h = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  const vh h = __builtin_convertvector(out, vh);
#endif
  std::memcpy(p, &h, sizeof(h));
}

#if !defined(__AVX2__)  // AVX2 and AVX-512 machines all have the F16C conversions
KLFLOW_INLINE float half_to_float(uint16_t h) {
  const uint32_t shifted = static_cast<uint32_t>(h & 0x7fff) << 13;
  float magnitude, scale;
  const uint32_t scale_bits = 0x77800000u;  // 2^112
  std::memcpy(&magnitude, &shifted, 4);
  std::memcpy(&scale, &scale_bits, 4);
  magnitude *= scale;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // infinity and NaN
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}
KLFLOW_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (bits < 0x38800000u) {  // below 2^-14: let the float adder round to a multiple of 2^-24
    float y, half_ulp = 0.5f;
    std::memcpy(&y, &bits, 4);
    y += half_ulp;
    uint32_t shifted;
    std::memcpy(&shifted, &y, 4);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  const uint32_t rounded = bits + 0xc8000fffu + ((bits >> 13) & 1u);  // -112 exponents, round to nearest even
  return static_cast<uint16_t>(sign | (rounded >> 13));
}
#endif

KLFLOW_INLINE vf load(const fp16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif defined(__AVX2__)
  return reinterpret_cast<vf>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}
KLFLOW_INLINE void store(fp16* p, vf v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof(h));
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof(h));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// The last n < kLanes elements of a row; missing lanes read as fill.
template <class T>
KLFLOW_INLINE vf load_tail(const T* p, int n, float fill) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
    return reinterpret_cast<vf>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, p));
  }
#endif
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  vf v = load(padded);
  for (int i = n; i < kLanes; ++i) v[i] = fill;
  return v;
}
template <class T>
KLFLOW_INLINE void store_tail(T* p, vf v, int n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// ---- reductions, in an order that depends on the lanes alone
KLFLOW_INLINE float sum_lanes(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
KLFLOW_INLINE float max_lanes(vf v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
// One instruction each, which the compiler does not find by itself; b where either is a NaN.
#if defined(__AVX512F__)
KLFLOW_INLINE vf maximum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
KLFLOW_INLINE vf minimum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#elif defined(__AVX2__)
KLFLOW_INLINE vf maximum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
KLFLOW_INLINE vf minimum(vf a, vf b) {
  return reinterpret_cast<vf>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
#else
KLFLOW_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
KLFLOW_INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
#endif
KLFLOW_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// ---- exp and log2. Coefficients are minimax fits (relative error 1.9e-9 and 2.6e-8 before rounding); the measured
// error is at most 2 ulp (python_tests/test_ops_cpu.py).
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

KLFLOW_INLINE vf expv(vf x) {  // any x: 0 below -104, infinity above 89, NaN stays
  x = minimum(splat(89.0f), maximum(splat(-104.0f), x));
  const vf n = round_even(x * 1.4426950408889634f);
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact in n * part
  vf p = splat(0.0013836846136895651f);
  p = p * r + 0.008374815778155631f;
  p = p * r + 0.041668225566092766f;
  p = p * r + 0.1666642017026965f;
  p = p * r + 0.499999920798404f;
  p = p * r + 1.0000000363230943f;
  p = p * r + 1.0000000005541647f;
  return scale_by_power(p, n);
}

// ---- Philox words of kLanes consecutive counters, in column order (4 kLanes columns)
KLFLOW_INLINE vu64 multiply_low(vu64 a, uint32_t b) {  // low halves of the 64-bit lanes, full products
#if defined(__AVX512F__)
  return reinterpret_cast<vu64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vu64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<vu64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffull) * static_cast<uint64_t>(b);
#endif
}

struct PhiloxKey {  // what stays the same along a row
  PhiloxKey(uint64_t seed, uint32_t row, uint32_t step, uint32_t stream) : row(row), step(step), stream(stream) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      round_keys[2 * round] = k0;
      round_keys[2 * round + 1] = k1;
    }
  }
  uint32_t row, step, stream;
  uint64_t round_keys[20];  // as 64-bit lanes, so that a round reads its keys as broadcast memory operands
};

constexpr int kHalf = kLanes / 2;  // 64-bit lanes in a vector: counters per block

// How many independent chains run side by side: Philox rounds and polynomials are chains of dependent steps, and a
// processor's scheduler is too short to find the next chain by itself. Limited by the number of vector registers.
#if defined(__AVX512F__)
constexpr int kChains = 4;
#else
constexpr int kChains = 2;
#endif

template <class F>
KLFLOW_INLINE void each_chain(F&& f) {
#pragma GCC unroll 8
  for (int i = 0; i < kChains; ++i) f(i);
}

// Words of columns [column, column + 2 kLanes kChains) in column order, column a multiple of 4: two vectors a chain.
KLFLOW_INLINE void philox_words(const PhiloxKey& key, int64_t column, vu (&words)[2 * kChains]) {
#if defined(__AVX512F__)
  constexpr vu64 kIota = {0, 1, 2, 3, 4, 5, 6, 7};
#elif defined(__AVX2__)
  constexpr vu64 kIota = {0, 1, 2, 3};
#else
  constexpr vu64 kIota = {0, 1};
#endif
  vu64 c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  each_chain([&](int i) {
    c0[i] = kIota + static_cast<uint64_t>(column / 4 + i * kHalf);
    c1[i] = vu64{} + key.row;
    c2[i] = vu64{} + key.step;
    c3[i] = vu64{} + key.stream;
  });
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {  // only the low halves of the lanes count until the end
    vu64 p0[kChains], p1[kChains];
    each_chain([&](int i) { p0[i] = multiply_low(c0[i], kPhiloxM0); });
    each_chain([&](int i) { p1[i] = multiply_low(c2[i], kPhiloxM1); });
    each_chain([&](int i) { c0[i] = (p1[i] >> 32) ^ c1[i] ^ key.round_keys[2 * round]; });
    each_chain([&](int i) { c2[i] = (p0[i] >> 32) ^ c3[i] ^ key.round_keys[2 * round + 1]; });
    each_chain([&](int i) { c1[i] = p1[i], c3[i] = p0[i]; });
  }
  each_chain([&](int i) {
    const vu64 low = (c0[i] & 0xffffffffull) | (c1[i] << 32), high = (c2[i] & 0xffffffffull) | (c3[i] << 32);
#if defined(__AVX512F__)
    const vu64 a = __builtin_shuffle(low, high, vu64{0, 8, 1, 9, 2, 10, 3, 11});
    const vu64 b = __builtin_shuffle(low, high, vu64{4, 12, 5, 13, 6, 14, 7, 15});
#elif defined(__AVX2__)
    const vu64 a = __builtin_shuffle(low, high, vu64{0, 4, 1, 5});
    const vu64 b = __builtin_shuffle(low, high, vu64{2, 6, 3, 7});
#else
    const vu64 a = __builtin_shuffle(low, high, vu64{0, 2});
    const vu64 b = __builtin_shuffle(low, high, vu64{1, 3});
#endif
    words[2 * i] = reinterpret_cast<vu>(a);
    words[2 * i + 1] = reinterpret_cast<vu>(b);
  });
}

KLFLOW_INLINE vf to_float(vu w) {
#if defined(__AVX512F__)
  return reinterpret_cast<vf>(_mm512_cvtepu32_ps(reinterpret_cast<__m512i>(w)));
#else
  // Two exact halves, one rounding at the sum: the same result as a direct conversion.
  const vf high = __builtin_convertvector(reinterpret_cast<vi>(w >> 16), vf) * 65536.0f;
  return high + __builtin_convertvector(reinterpret_cast<vi>(w & 0xffffu), vf);
#endif
}

// U of the noise contract.
KLFLOW_INLINE vf simplex_uniformv(vu w) {
  const vf u = (to_float(w) + 0.5f) * 2.3283064365386963e-10f;
  return u < 0.99999994f ? u : splat(0.99999994f);
}

constexpr int kNoiseColumns = 2 * kLanes * kChains;  // columns made at a time

// x = log2(x) for positive normal x, relative accuracy near 1 too; kChains vectors side by side.
KLFLOW_INLINE void log2_chains(vf* x) {
  constexpr float kCoefficients[] = {0.1258369936017068f,  -0.20726972741798402f, 0.21571560772593848f,
                                     -0.2389448249822585f, 0.2879162483697456f,   -0.3607036826008446f,
                                     0.48091064292651386f, -0.7213473468070407f,  1.4426950036526216f};
  vf exponent[kChains], f[kChains], p[kChains];
  each_chain([&](int i) {
    const vi bits = as_int(x[i]);
    const vi e = (bits - 0x3f3504f3) >> 23;  // x = m 2^e, m in [sqrt(1/2), sqrt(2))
    f[i] = as_float(bits - (e << 23)) - 1.0f;
    exponent[i] = __builtin_convertvector(e, vf);
    p[i] = splat(kCoefficients[0]);
  });
#pragma GCC unroll 8
  for (int k = 1; k < 9; ++k) each_chain([&](int i) { p[i] = p[i] * f[i] + kCoefficients[k]; });
  each_chain([&](int i) { x[i] = p[i] * f[i] + exponent[i]; });
}

// x = 2^x for x in [-252, 252]; kChains vectors side by side.
KLFLOW_INLINE void exp2_chains(vf* x) {
  constexpr float kCoefficients[] = {0.00015345812161311629f, 0.0013399931177239738f, 0.009618488956331182f,
                                     0.05550328777105325f,    0.24022646890645522f,   0.6931472057371958f,
                                     1.0000000005541647f};
  vf n[kChains], p[kChains];
  each_chain([&](int i) {
    n[i] = round_even(x[i]);
    x[i] -= n[i];
    p[i] = splat(kCoefficients[0]);
  });
#pragma GCC unroll 6
  for (int k = 1; k < 7; ++k) each_chain([&](int i) { p[i] = p[i] * x[i] + kCoefficients[k]; });
  each_chain([&](int i) { x[i] = scale_by_power(p[i], n[i]); });
}

}  // namespace klflow::KLFLOW_ISA
