// The evidence e_j of every token in a row (PosteriorParams in common/params.h) from E_j and their sum.
#pragma once

#include "../common/geodesic.h"
#include "row.cuh"

namespace klflow::cuda {

// Rows up to this length have single E_j of weight in the sum: their E_j, sums and logarithms are made one column at a
// time and as exactly as float32 allows. In longer rows (1 - e^-s) E_j / S < 2^-6.
constexpr int kNarrow = 2048;

__device__ __forceinline__ float exact_noise(const Words4& words, int64_t column) {
  return -logf(simplex_uniform(word_at(words, column)));
}

struct Evidence {
  double sum;         // S
  float vocab, stay;  // V, e^-s
  float share;        // (1 - e^-s) / S
  float own;          // e_k

  __device__ __forceinline__ Evidence(Split<float> split, float gain, int64_t columns) {
    sum = split.sum();
    vocab = static_cast<float>(columns);
    stay = expf(-gain);
    share = share_of(gain, static_cast<float>(sum));
    own = split.own_evidence(vocab);
  }
  // z_j = log_prior_j + e_j of any other token of a long row: V evidence_series(w) w, the factor in its coefficients.
  __device__ __forceinline__ float posterior(float noise, float log_prior) const {
    const float w = share * noise;
    return w * (w * (w * (w * (vocab * 0.25f) + vocab * 0.33333334f) + vocab * 0.5f) + vocab) + log_prior;
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
