// The noise of a row: logarithms, exponentials and powers of them, kNoiseColumns at a time.
#pragma once

#include <algorithm>

#include "block.h"
#include "exp2.h"
#include "philox.h"

namespace klflow::KLFLOW_ISA {

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

// E of columns [column, column + kNoiseColumns), column a multiple of 4, in units of ln 2: in [8.6e-8, 33].
template <bool kShort = false>
KLFLOW_INLINE void exponentials(const PhiloxKey& key, int64_t column, vf (&e)[2 * kChains]) {
  vu words[2 * kChains];
  philox_words(key, column, words);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    vf* v = e + half * kChains;
    each_chain([&](int i) { v[i] = simplex_uniformv(words[half * kChains + i]); });
    log2_chains<kShort>(v);
    each_chain([&](int i) { v[i] = -v[i]; });
  }
}

// Fills y with columns [first, first + n) of the unnormalised noisy row E_j^(1 - t) (or, with kLog, with (1 - t) log2
// E_j) and returns the sum of E_j^(1 - t). E is in units of ln 2, a factor that the normalisation removes; first is a
// multiple of 4; y has room for kNoiseColumns more. meanwhile(n) is called for every n columns made: what can be done
// beside the arithmetic. kShort: y is for 16-bit results.
template <bool kLog, bool kShort, class F>
double noise_row(const PhiloxKey& key, int64_t first, int64_t n, float one_minus_t, float* y, F&& meanwhile) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    vf sums[kChains] = {};
    for (int64_t column = begin; column < end; column += kNoiseColumns) {
      meanwhile(kNoiseColumns);
      vf powers[2 * kChains];
      exponentials<kShort>(key, first + column, powers);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        vf* v = powers + half * kChains;
        log2_absolute_chains<kShort>(v);
        each_chain([&](int i) { v[i] *= one_minus_t; });
        float* out = y + column + half * kChains * kLanes;
        if constexpr (kLog) each_chain([&](int i) { store(out + i * kLanes, v[i]); });
        exp2_chains<kShort>(v);
        if constexpr (!kLog) each_chain([&](int i) { store(out + i * kLanes, v[i]); });
      }
      const int64_t left = end - column;
      if (left < kNoiseColumns) {  // the columns past the end do not count
        float lanes[kNoiseColumns];
        for (int i = 0; i < 2 * kChains; ++i) store(lanes + i * kLanes, powers[i]);
        std::fill(lanes + left, lanes + kNoiseColumns, 0.0f);
        for (int i = 0; i < 2 * kChains; ++i) powers[i] = load(lanes + i * kLanes);
      }
      each_chain([&](int i) { sums[i] += powers[i] + powers[kChains + i]; });
    }
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    total += static_cast<double>(sum_lanes(sums[0]));
  }
  return total;
}

inline PhiloxKey philox_key(const Rng& rng, int64_t row, uint32_t stream) {
  const Rng::State state = rng.at(row);
  return {static_cast<uint32_t>(state.seed) | static_cast<uint64_t>(key_of_row(state.seed, state.row)) << 32,
          static_cast<uint32_t>(state.row), static_cast<uint32_t>(state.step), stream};
}

}  // namespace klflow::KLFLOW_ISA
