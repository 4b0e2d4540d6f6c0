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

// ---- exp2 and log2. Coefficients are minimax fits; the measured error of exp2v is at most 2 ulp, that of log2_chains
// at most 2.5e-7 of its value (python_tests/csrc/test_cpu_math.py).
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

// What stays the same along a row. The counter's column enters one of the four words, so the first rounds have parts
// that are constant along the row: they are worked out here, in scalars.
struct PhiloxKey {
  PhiloxKey(uint64_t seed, uint32_t row, uint32_t step, uint32_t stream) : row(row), step(step), stream(stream) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      round_keys[2 * round] = k0;
      round_keys[2 * round + 1] = k1;
    }
    auto key = [&](int i) { return static_cast<uint32_t>(round_keys[i]); };
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * step;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ row ^ key(0), c1 = static_cast<uint32_t>(p1);
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    first = stream ^ key(1);
    second0 = c1 ^ key(2);
    second1 = static_cast<uint32_t>(p0 >> 32) ^ key(3);
    third = static_cast<uint32_t>(p0) ^ key(5);
  }
  uint32_t row, step, stream;
  uint64_t round_keys[20];  // as 64-bit lanes, so that a round reads its keys as broadcast memory operands
  uint64_t first, second0, second1, third;  // constants of the first three rounds
};

// (high half of p) ^ low half of c ^ key in the low half of each lane, the low half of p in the high one.
KLFLOW_INLINE vu64 last_word(vu64 p, vu64 c, uint64_t key) {
#if defined(__AVX512F__)
  const __m512i turned = _mm512_shuffle_epi32(reinterpret_cast<__m512i>(p), static_cast<_MM_PERM_ENUM>(0xB1));
  const __m512i c_bits = reinterpret_cast<__m512i>(c);
  return reinterpret_cast<vu64>(
      _mm512_mask_ternarylogic_epi32(turned, 0x5555, c_bits, _mm512_set1_epi64(key), 0x96));  // xor of the three
#else
  return (p >> 32 | p << 32) ^ (c & 0xffffffffull) ^ key;
#endif
}

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
// The counters of a chain are in the order that makes the last step an unpacking within 128 bits.
KLFLOW_INLINE void philox_words(const PhiloxKey& key, int64_t column, vu (&words)[2 * kChains]) {
#if defined(__AVX512F__)
  constexpr vu64 kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
#elif defined(__AVX2__)
  constexpr vu64 kOrder = {0, 2, 1, 3};
#else
  constexpr vu64 kOrder = {0, 1};
#endif
  vu64 c0[kChains], c1[kChains], c2[kChains], c3[kChains], p0[kChains], p1[kChains];
  // Only the low halves of the lanes count until the end. Rounds 1 to 3, their constant parts folded:
  const vu64 start = kOrder * static_cast<uint64_t>(kPhiloxM0) + static_cast<uint64_t>(column / 4) * kPhiloxM0;
  each_chain([&](int i) { c3[i] = start + static_cast<uint64_t>(i * kHalf) * kPhiloxM0; });
  each_chain([&](int i) { c2[i] = (c3[i] >> 32) ^ key.first; });
  each_chain([&](int i) { c1[i] = multiply_low(c2[i], kPhiloxM1); });
  each_chain([&](int i) { c0[i] = (c1[i] >> 32) ^ key.second0; });
  each_chain([&](int i) { c2[i] = c3[i] ^ key.second1; });
  each_chain([&](int i) { p0[i] = multiply_low(c0[i], kPhiloxM0); });
  each_chain([&](int i) { p1[i] = multiply_low(c2[i], kPhiloxM1); });
  each_chain([&](int i) { c0[i] = (p1[i] >> 32) ^ c1[i] ^ key.round_keys[4]; });
  each_chain([&](int i) { c2[i] = (p0[i] >> 32) ^ key.third; });
  each_chain([&](int i) { c1[i] = p1[i], c3[i] = p0[i]; });
#pragma GCC unroll 6
  for (int round = 3; round < 9; ++round) {
    each_chain([&](int i) { p0[i] = multiply_low(c0[i], kPhiloxM0); });
    each_chain([&](int i) { p1[i] = multiply_low(c2[i], kPhiloxM1); });
    each_chain([&](int i) { c0[i] = (p1[i] >> 32) ^ c1[i] ^ key.round_keys[2 * round]; });
    each_chain([&](int i) { c2[i] = (p0[i] >> 32) ^ c3[i] ^ key.round_keys[2 * round + 1]; });
    each_chain([&](int i) { c1[i] = p1[i], c3[i] = p0[i]; });
  }
  // The last round leaves word 0 (2) in the low and word 1 (3) in the high half of each lane.
  each_chain([&](int i) { p0[i] = multiply_low(c0[i], kPhiloxM0); });
  each_chain([&](int i) { p1[i] = multiply_low(c2[i], kPhiloxM1); });
  each_chain([&](int i) {
    const vu64 low = last_word(p1[i], c1[i], key.round_keys[18]), high = last_word(p0[i], c3[i], key.round_keys[19]);
#if defined(__AVX512F__)
    const vu64 a = __builtin_shuffle(low, high, vu64{0, 8, 2, 10, 4, 12, 6, 14});
    const vu64 b = __builtin_shuffle(low, high, vu64{1, 9, 3, 11, 5, 13, 7, 15});
#elif defined(__AVX2__)
    const vu64 a = __builtin_shuffle(low, high, vu64{0, 4, 2, 6});
    const vu64 b = __builtin_shuffle(low, high, vu64{1, 5, 3, 7});
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
  const vf u = to_float(w) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;  // 2^-32, 2^-33: one rounding if fused
  return minimum(u, splat(0.99999994f));
}

constexpr int kNoiseColumns = 2 * kLanes * kChains;  // columns made at a time

#if defined(__AVX512F__)
// Logarithms by table: the leading four bits of the mantissa pick 1 / centre and its log2; what is left of the
// mantissa, r in [-1/32, 1/16], needs a short polynomial. 12 instructions where a polynomial alone takes 17.
struct alignas(64) LogTable {
  float inverse[16], log2[16];
};
// Mantissas in [3/4, 3/2). The two cells that meet at 1 have centre 1, so that log2 is accurate relative to its value.
inline constexpr LogTable kLogAround1 = {
    {1.0f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
     1.30612242f, 1.25490201f, 1.20754719f, 1.16363633f, 1.12280703f, 1.08474576f, 1.04918027f, 1.0f},
    {0.0f, 0.129283009f, 0.209453331f, 0.2854022f, 0.357552058f, 0.42626476f, 0.491853061f, 0.554588897f, -0.385290126f,
     -0.327574709f, -0.272079567f, -0.218640241f, -0.167109997f, -0.117356953f, -0.0692625818f, 0.0f},
};
// Mantissas in [1, 2).
inline constexpr LogTable kLogAbove1 = {
    {0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f, 0.711111128f, 0.680851042f,
     0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f, 0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f},
    {0.0443940764f, 0.129283009f, 0.209453331f, 0.2854022f, 0.357552058f, 0.42626476f, 0.491853061f, 0.554588897f,
     0.614709874f, 0.672425291f, 0.727920433f, 0.781359759f, 0.832890003f, 0.882643047f, 0.930737418f, 0.97727984f},
};
KLFLOW_INLINE vf pick(const float* table, vf x) {
  const __m512i index = _mm512_srli_epi32(reinterpret_cast<__m512i>(x), 19);  // only its low four bits count
  return reinterpret_cast<vf>(_mm512_permutexvar_ps(index, _mm512_load_ps(table)));
}
#endif

// x = log2(x) for positive normal x, relative accuracy near 1 too; kChains vectors side by side. kShort, here and
// below: for results of 16 bits, a relative error of 7e-6 (where the polynomial is short anyway, by table).
template <bool kShort = false>
KLFLOW_INLINE void log2_chains(vf* x) {
#if defined(__AVX512F__)
  constexpr float kLong[] = {-0.34380023854976843f, 0.48111879297971744f, -0.7213621383707383f, 1.4426950031395303f};
  constexpr float kBrief[] = {0.46496531996795953f, -0.7216781266640179f, 1.4427026144219246f};
  constexpr int kTerms = kShort ? 3 : 4;
  const float* kCoefficients = kShort ? kBrief : kLong;
  vf r[kChains], p[kChains];
  each_chain([&](int i) {
    // The exponent that goes with a mantissa in [3/4, 3/2): x * 4/3, rounded upwards, tells which half x is in.
    const vf exponent = reinterpret_cast<vf>(_mm512_getexp_ps(reinterpret_cast<__m512>(x[i] * 1.33333337f)));
    const vf mantissa = reinterpret_cast<vf>(
        _mm512_getmant_ps(reinterpret_cast<__m512>(x[i]), _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero));
    r[i] = mantissa * pick(kLogAround1.inverse, x[i]) - 1.0f;
    x[i] = exponent + pick(kLogAround1.log2, x[i]);
    p[i] = splat(kCoefficients[0]);
  });
#pragma GCC unroll 3
  for (int k = 1; k < kTerms; ++k) each_chain([&](int i) { p[i] = p[i] * r[i] + kCoefficients[k]; });
  each_chain([&](int i) { x[i] = p[i] * r[i] + x[i]; });
#else
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
#endif
}

// x = log2(x) for positive normal x with an absolute error of 6e-8 (kShort: 4e-6) and rounding: the argument of a later
// exp2.
template <bool kShort = false>
KLFLOW_INLINE void log2_absolute_chains(vf* x) {
#if defined(__AVX512F__)
  vf r[kChains], p[kChains];
  each_chain([&](int i) {
    const vf exponent = reinterpret_cast<vf>(_mm512_getexp_ps(reinterpret_cast<__m512>(x[i])));
    const vf mantissa =
        reinterpret_cast<vf>(_mm512_getmant_ps(reinterpret_cast<__m512>(x[i]), _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero));
    r[i] = mantissa * pick(kLogAbove1.inverse, x[i]) - 1.0f;
    x[i] = exponent + pick(kLogAbove1.log2, x[i]);
  });
  if constexpr (kShort) {
    each_chain([&](int i) { p[i] = r[i] * -0.7216857996230223f + 1.4430488734873963f; });
  } else {
    each_chain([&](int i) { p[i] = r[i] * 0.48129970189952953f + -0.7216413523038006f; });
    each_chain([&](int i) { p[i] = p[i] * r[i] + 1.442694925325859f; });
  }
  each_chain([&](int i) { x[i] = p[i] * r[i] + x[i]; });
#else
  log2_chains(x);
#endif
}

// x = 2^x for x in [-252, 252]; kChains vectors side by side. Minimax on [0, 1], relative error 7.5e-8
// (kShort: 2.6e-6).
template <bool kShort = false>
KLFLOW_INLINE void exp2_chains(vf* x) {
  constexpr float kLong[] = {0.0018775759520741789f, 0.008989341951014185f, 0.05582631637331071f,
                             0.24015361767154408f,   0.6931530731138261f,   0.9999999250661832f};
  constexpr float kBrief[] = {0.013534160616915885f, 0.0520114755916846f, 0.24144274725362397f, 0.6930038365123418f,
                              1.000002593283172f};
  constexpr int kTerms = kShort ? 5 : 6;
  const float* kCoefficients = kShort ? kBrief : kLong;
  vf n[kChains], p[kChains];
  each_chain([&](int i) {
    n[i] = round_down(x[i]);
    x[i] -= n[i];
    p[i] = splat(kCoefficients[0]);
  });
#pragma GCC unroll 5
  for (int k = 1; k < kTerms; ++k) each_chain([&](int i) { p[i] = p[i] * x[i] + kCoefficients[k]; });
  each_chain([&](int i) { x[i] = scale_by_power(p[i], n[i]); });
}

}  // namespace klflow::KLFLOW_ISA
