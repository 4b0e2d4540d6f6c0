// One vector of the instruction set this translation unit is compiled for (GCC vector extensions plus a few
// intrinsics): loads and stores of the three dtypes, and reductions over lanes. Everything lives in a namespace named
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

// Loads, stores and streams that spare a row's ends by masks are invisible to AddressSanitizer: under it, plain copies.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
#define KLFLOW_MASKED 1
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
KLFLOW_INLINE vu rounded_bf16(vf v) {  // the bfloat16 in the upper half of each lane
  const vu bits = reinterpret_cast<vu>(v);
  const vu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const vi number = v == v;
  return (rounded & reinterpret_cast<vu>(number)) | (0x7fc00000u & ~reinterpret_cast<vu>(number));
}
KLFLOW_INLINE void store(bf16* p, vf v) {
  const vu out = rounded_bf16(v) >> 16;
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

// One full vector register of elements, from one vector of floats or, for 16-bit elements, from two.
template <class T>
constexpr int kPacked = 4 / sizeof(T);
KLFLOW_INLINE vu pack(const float*, const vf (&v)[1]) { return reinterpret_cast<vu>(v[0]); }
KLFLOW_INLINE vu pack(const bf16*, const vf (&v)[2]) {
  const vu a = rounded_bf16(v[0]), b = rounded_bf16(v[1]);
#if defined(__AVX512F__)
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                      33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return reinterpret_cast<vu>(
      _mm512_permutex2var_epi16(reinterpret_cast<__m512i>(a), _mm512_load_si512(kUpper), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(a >> 16), reinterpret_cast<__m256i>(b >> 16));
  return reinterpret_cast<vu>(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  vu packed;
  const vh low = __builtin_convertvector(a >> 16, vh), high = __builtin_convertvector(b >> 16, vh);
  std::memcpy(&packed, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&packed) + sizeof(low), &high, sizeof(high));
  return packed;
#endif
}
KLFLOW_INLINE vu pack(const fp16*, const vf (&v)[2]) {
  vu packed;
  store(reinterpret_cast<fp16*>(&packed), v[0]);
  store(reinterpret_cast<fp16*>(&packed) + kLanes, v[1]);
  return packed;
}

// Past the caches, for results too large to be read back from them: memory is not read before it is overwritten.
// p is aligned to a full vector; stream_fence() before anyone else reads.
KLFLOW_INLINE void stream(void* p, vu x) {
#if defined(__SANITIZE_ADDRESS__)
  std::memcpy(p, &x, sizeof(x));
#elif defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(x));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(x));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(x));
#else
  std::memcpy(p, &x, sizeof(x));
#endif
}
KLFLOW_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The last n < kLanes elements of a row; missing lanes read as fill.
template <class T>
KLFLOW_INLINE vf load_tail(const T* p, int n, float fill) {
  if (n >= kLanes) __builtin_unreachable();
#if defined(KLFLOW_MASKED)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) return reinterpret_cast<vf>(_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, p));
  T padded[kLanes];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(mask, p));
  return reinterpret_cast<vf>(_mm512_mask_blend_ps(mask, _mm512_set1_ps(fill), reinterpret_cast<__m512>(load(padded))));
#else
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  vf v = load(padded);
  for (int i = n; i < kLanes; ++i) v[i] = fill;
  return v;
#endif
}
template <class T>
KLFLOW_INLINE void store_tail(T* p, vf v, int n) {
  if (n >= kLanes) __builtin_unreachable();
#if defined(KLFLOW_MASKED)
  const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
  } else {
    T padded[kLanes];
    store(padded, v);
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(padded)));
  }
#else
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
#endif
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

}  // namespace klflow::KLFLOW_ISA
