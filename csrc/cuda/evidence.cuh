// The evidence e_j of every token in a row (PosteriorParams in common/params.h) from E_j and their sum.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

// Rows up to this length have single E_j of weight in the sum: their E_j, sums and logarithms are made one column at a
// time and as exactly as float32 allows. In longer rows (1 - e^-s) E_j / S < 2^-6.
constexpr int kNarrow = 2048;

__device__ __forceinline__ float exact_noise(const Words4& words, int64_t column) {
  return -logf(simplex_uniform(word_at(words, column)));
}

// s = c t / (1 - t), with which the row's token has e^s times its own noise. Beyond kMostGain the row is onehot(token),
// as e^s E_k may be no float32.
constexpr float kMostGain = 80.0f;
__device__ __forceinline__ float gain_of(float t, float c) { return c * t / (1.0f - t); }

constexpr float kMostNoise = 22.9f;   // the largest E
constexpr float kSeries = 0.015625f;  // 2^-6: largest w for which four terms of -log(1 - w) are within 2e-8

// S = base + raised, split so that base / S = 1 - (1 - e^-s) u_k without cancellation.
struct Split {
  double base;
  float raised;
};
// Of noise whose E_k, own_noise, is boosted; base: the others, and e^(boost - s) own_noise (without boosts: all the
// noise).
__device__ __forceinline__ Split split_of_noise(double base, float own_noise, float boost, float gain) {
  return {base, -expm1f(-gain) * expf(boost) * own_noise};
}

struct Evidence {
  double sum;         // S
  float vocab, stay;  // V, e^-s
  float share;        // (1 - e^-s) / S
  float own;          // e_k

  __device__ __forceinline__ Evidence(Split split, float gain, int64_t columns) {
    sum = split.base + split.raised;
    vocab = static_cast<float>(columns);
    stay = expf(-gain);
    share = -expm1f(-gain) / static_cast<float>(sum);
    own = vocab * log1pf(split.raised / static_cast<float>(split.base));
  }
  // z_j = log_prior_j + e_j of any other token of a long row.
  __device__ __forceinline__ float posterior(float noise, float log_prior) const {
    const float w = share * noise;
    return vocab * w * (1.0f + w * (0.5f + w * (0.33333334f + w * 0.25f))) + log_prior;
  }
  // The same where w may be large: up to 1/2.
  __device__ __forceinline__ float any_posterior(float noise, float log_prior) const {
    return share * noise <= kSeries ? posterior(noise, log_prior) : log_prior - vocab * log1pf(-share * noise);
  }
  // e_j of any other token of a narrow row.
  __device__ __forceinline__ float narrow(float noise) const {
    const float w = share * noise;
    if (w < 0.5f) return -vocab * log1pf(-w);
    const double e = noise;
    return -vocab * logf(static_cast<float>((sum - e + stay * e) / sum));
  }
};

// exp(z - shift).
__device__ __forceinline__ float mass_of(float z, float shift) { return ex2_approx((z - shift) * 1.4426950408889634f); }

}  // namespace klflow::cuda
