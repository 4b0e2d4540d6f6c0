// The evidence e_j of a noisy row (PosteriorParams of common/params.h) from its noise, a vector at a time. E is in
// units of ln 2 throughout (it comes from log2), which cancels in E_j / S.
#pragma once

#include "../common/geodesic.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

constexpr float kMostUnits = 33.1f;  // no E is above: kMostNoise in units of ln 2

// Whether the row of a target is onehot(target).
inline bool is_certain(double gain) { return !(gain < kMostGain); }

// The sum of the noise, here in units of ln 2, in the stats of a row; shift is the same z again only from the same sum.
inline float stats_of_noise(double noise) { return static_cast<float>(noise * kLn2); }
inline double noise_of_stats(float noise) { return noise / kLn2; }

struct Evidence {
  double share;
  float to_w, to_v_w;  // share and V share in float32: E to w and to the first term of e
  bool needs_log1p;    // some w may be too large for the series
  int64_t vocab;

  // largest: no E is above.
  Evidence(double gain, double sum, int64_t vocab, float largest = kMostUnits)
      : share(share_of(gain, sum)),
        to_w(static_cast<float>(share)),
        to_v_w(static_cast<float>(share * vocab)),
        needs_log1p(share * largest > kSeries),
        vocab(vocab) {}

  KLFLOW_INLINE vf operator()(vf noise) const { return (noise * to_v_w) * evidence_series(noise * to_w); }
  // The same for any w, one lane at a time.
  float log1p(float noise) const { return static_cast<float>(-vocab * std::log1p(-share * noise)); }
};

// e_k in float32.
inline float own_evidence(const Split<double>& split, int64_t vocab) {
  return static_cast<float>(split.own_evidence(static_cast<double>(vocab)));
}

// z = log_prior + e over n columns of E; the target's own is for the caller to put right.
KLFLOW_INLINE void evidence_block(const Evidence& evidence, const float* e, const float* log_prior, int64_t n,
                                  float* z) {
  for_vectors(n, [&](int64_t i, int m) {
    const vf noise = load_n(e + i, m, 0.0f);
    vf v = evidence(noise);
    if (evidence.needs_log1p && any(noise * evidence.to_w > kSeries)) {
      for (int lane = 0; lane < kLanes; ++lane)
        if (noise[lane] * evidence.to_w > kSeries) v[lane] = evidence.log1p(noise[lane]);
    }
    store_n(z + i, load_n(log_prior + i, m, 0.0f) + v, m);
  });
}

}  // namespace klflow::KLFLOW_ISA
