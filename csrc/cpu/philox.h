// Philox words of consecutive columns, several chains side by side, under the contract of common/philox.h.
#pragma once

#include "simd.h"

namespace klflow::KLFLOW_ISA {

// Words of kLanes consecutive counters, in column order (4 kLanes columns)
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

}  // namespace klflow::KLFLOW_ISA
