// The formulas of the path that every backend shares, in one vocabulary; klflow_ext/reference.py is their twin.
//   gap     c = log(V / beta - V + 1): log(x_1[k] / x_1[j]) of a target k and any other token j
//   gain    s = c t / (1 - t): the log-ratio that the path adds to the target by time t, next to noise of weight 1
//   boost   the log-ratio that one slot adds to its column; that of a target's own column is the gain
//   share   (1 - e^-s) / S, S = the sum of a row's E: the part w = share E of the evidence of a column
//   evidence  e_j = -V log(1 - w_j) = V (w_j + w_j^2 / 2 + ...): see PosteriorParams in params.h
// Real is float or double: kernels that keep rows in shared memory work in float, the CPU in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace klflow {

// From this gain on (in float32: beyond it), and at t = 1, a target's row is onehot(target): every other token's
// posterior is below the smallest float32.
constexpr float kMostGain = 80.0f;
constexpr float kMostBoost = 60.0f;   // boosts beyond +-60 count as +-60
constexpr float kMostNoise = 22.9f;   // the largest E
constexpr float kSeries = 0.015625f;  // 2^-6: largest w for which four terms of -log(1 - w) are within 2e-8

KLFLOW_HD float exp_of(float x) { return expf(x); }
KLFLOW_HD double exp_of(double x) { return exp(x); }
KLFLOW_HD float expm1_of(float x) { return expm1f(x); }
KLFLOW_HD double expm1_of(double x) { return expm1(x); }
KLFLOW_HD float log1p_of(float x) { return log1pf(x); }
KLFLOW_HD double log1p_of(double x) { return log1p(x); }

inline float gap_of(double beta, int64_t vocab) { return static_cast<float>(std::log(vocab / beta - vocab + 1.0)); }

template <class Real>
KLFLOW_HD Real gain_of(Real t, Real c) {
  return c * t / (Real(1) - t);
}

// 1 - e^-s, without cancellation.
template <class Real>
KLFLOW_HD Real lift_of(Real gain) {
  return -expm1_of(-gain);
}

template <class Real>
KLFLOW_HD Real share_of(Real gain, Real sum) {
  return lift_of(gain) / sum;
}

// e / (V w) of w <= kSeries: 1 + w / 2 + w^2 / 3 + w^3 / 4. Of a number or of a vector.
template <class Vector>
KLFLOW_HD Vector evidence_series(Vector w) {
  return ((w * 0.25f + 0.33333334f) * w + 0.5f) * w + 1.0f;
}

// S = base + raised, split so that base / S = 1 - (1 - e^-s) u_k without cancellation.
template <class Real>
struct Split {
  double base;
  Real raised;

  KLFLOW_HD double sum() const { return base + raised; }
  // e_k, the evidence of the row's token.
  KLFLOW_HD Real own_evidence(Real vocab) const { return vocab * log1p_of(raised / static_cast<Real>(base)); }
};

// Of noise whose E_k, own, is boosted; base: the others, and e^(boost - s) own (without boosts: all the noise).
template <class Real>
KLFLOW_HD Split<Real> split_of_noise(double base, Real own, Real boost, Real gain) {
  return {base, lift_of(gain) * exp_of(boost) * own};
}

}  // namespace klflow
