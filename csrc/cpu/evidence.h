// The evidence e_j of a noisy row (PosteriorParams of common/params.h) from its noise, a vector at a time. E is in
// units of ln 2 throughout (it comes from log2), which cancels in E_j / S.
#pragma once

#include "row.h"

namespace klflow::KLFLOW_ISA {

constexpr float kSeries = 0.015625f;  // 2^-6: largest w for which four terms of -log(1 - w) are within 2e-8

// s = c t / (1 - t), the log-ratio that moves u towards the target. From 80 on (and at t = 1) the row is
// onehot(target): every other token's posterior is below the smallest float32.
struct Pull {
  Pull(float t, float c) : s(static_cast<double>(c) * t / (1.0 - t)), certain(!(s < 80.0)) {}
  double s;
  bool certain;
};

// The sum of the noise, here in units of ln 2, in the stats of a row; shift is the same z again only from the same sum.
inline float stats_of_noise(double noise) { return static_cast<float>(noise * kLn2); }
inline double noise_of_stats(float noise) { return noise / kLn2; }

struct Evidence {
  double slope;      // (1 - e^-s) / S
  float w, v_w;      // slope and V slope in float32: E to w and to the first term of e
  bool needs_log1p;  // some w may be too large for the series
  int64_t vocab;

  // largest: no E is above; that of the noise by default, 33 ln 2.
  Evidence(double s, double sum, int64_t vocab, float largest = 33.1f)
      : slope(-std::expm1(-s) / sum),
        w(static_cast<float>(slope)),
        v_w(static_cast<float>(slope * vocab)),
        needs_log1p(slope * largest > kSeries),
        vocab(vocab) {}

  // e = -V log(1 - slope E) = V (w + w^2 / 2 + w^3 / 3 + ...).
  KLFLOW_INLINE vf operator()(vf e) const {
    const vf x = e * w;
    vf p = x * 0.25f + 0.33333334f;
    p = p * x + 0.5f;
    p = p * x + 1.0f;
    return (e * v_w) * p;
  }
  // The same for any w, one lane at a time.
  float log1p(float e) const { return static_cast<float>(-vocab * std::log1p(-slope * e)); }
};

// S = base + raised, split so that base / S = 1 - (1 - e^-s) u_k without cancellation.
struct Split {
  double base, raised;
  double sum() const { return base + raised; }
  // Of noise whose E_k, `own`, is boosted; base: the others, and e^(boost - s) own (without boosts: all the noise).
  static Split of_noise(double base, double own, double boost, double s) {
    return {base, -std::expm1(-s) * std::exp(boost) * own};
  }
  float own_evidence(int64_t vocab) const { return static_cast<float>(vocab * std::log1p(raised / base)); }  // e_k
};

// z = log_prior + e over n columns of E; the target's own is for the caller to put right.
KLFLOW_INLINE void evidence_block(const Evidence& evidence, const float* e, const float* log_prior, int64_t n,
                                  float* z) {
  for_vectors(n, [&](int64_t i, int m) {
    const vf noise = load_n(e + i, m, 0.0f);
    vf v = evidence(noise);
    if (evidence.needs_log1p && any(noise * evidence.w > kSeries)) {
      for (int lane = 0; lane < kLanes; ++lane)
        if (noise[lane] * evidence.w > kSeries) v[lane] = evidence.log1p(noise[lane]);
    }
    store_n(z + i, load_n(log_prior + i, m, 0.0f) + v, m);
  });
}

}  // namespace klflow::KLFLOW_ISA
