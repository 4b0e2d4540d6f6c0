// Draws a token from the top-k of a row (topk_sample), and re-noises the row towards it (topk_renoise). Every logit has
// a unique 64-bit key, (ordered value, ~column): a larger key is a larger logit or, on ties, a lower column. The k-th
// key is found by an 8-bit radix descent, so the result never depends on the order of arrival. Never materialised:
// sorted rows, probabilities, x_0.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

__device__ __forceinline__ uint64_t key_of(float logit, int64_t column) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 counts as 0
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | ~static_cast<uint32_t>(column);
}

// The k-th largest key of the row.
__device__ __forceinline__ uint64_t kth_key(const Rows& logits, int64_t row, int64_t vocab, int64_t k) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(shared_memory() + kPartialBytes);
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int digit = threadIdx.x; digit < 256; digit += kThreads) counts[digit] = 0;
    __syncthreads();
    const uint64_t above = shift == 56 ? 0 : ~0ull << (shift + 8);  // digits already decided
    for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
      const uint64_t key = key_of(load(logits, row, j), j);
      if ((key & above) == prefix) atomicAdd(&counts[key >> shift & 255], 1u);
    }
    __syncthreads();
    int digit = 255;
    while (k > counts[digit]) k -= counts[digit--];
    prefix |= static_cast<uint64_t>(digit) << shift;
  }
  return prefix;
}

struct Best {
  float score, logit;
  int64_t column;
  __device__ __forceinline__ Best shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, score, offset), __shfl_down_sync(~0u, logit, offset),
            __shfl_down_sync(~0u, static_cast<long long>(column), offset)};
  }
};
__device__ __forceinline__ Best better(Best a, Best b) {
  if (a.column < 0 || b.column < 0) return a.column < 0 ? b : a;
  return a.score > b.score || (a.score == b.score && a.column < b.column) ? a : b;
}

// The drawn token, or -1; log_prob likewise, or NaN. The same in every thread.
__device__ __forceinline__ int64_t draw_token(const TopkSampleParams& p, int64_t row, float& log_prob) {
  log_prob = not_a_number();
  if (is_given(p.given, row)) {
    log_prob = 0.0f;
    return token_at(p.given.known, row);
  }
  Best top{-infinity(), 0.0f, -1};  // the maximum, or +infinity in the score where there is a NaN
  for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) {
    const float z = load(p.logits, row, j);
    top = better(top, {z == z ? z : infinity(), z, j});
  }
  top = block_reduce(top, [](Best a, Best b) { return better(a, b); });
  if (top.score == infinity() || top.score == -infinity()) return -1;
  if (p.k == 1) {
    log_prob = 0.0f;
    return top.column;
  }
  const double inverse = 1.0 / p.temperature;
  auto mass = [&](float z) { return exp(static_cast<double>(z - top.score) * inverse); };
  auto mass_from = [&](uint64_t threshold) {
    double mine = 0.0;
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) {
      const float z = load(p.logits, row, j);
      if (key_of(z, j) >= threshold) mine += mass(z);
    }
    return block_sum(mine);
  };
  uint64_t threshold = p.k >= p.vocab ? 0 : kth_key(p.logits, row, p.vocab, p.k);
  double total = mass_from(threshold);
  if (p.top_p < 1.0f) {  // the largest threshold whose keys still hold the mass, bit by bit
    const double wanted = p.top_p * total;
    uint64_t best = 0;
    for (int bit = 63; bit >= 0; --bit) {
      const uint64_t candidate = best | 1ull << bit;
      if (candidate <= threshold || mass_from(candidate) >= wanted) best = candidate;
    }
    threshold = best > threshold ? best : threshold;
    total = mass_from(threshold);
  }
  const NoiseKey key = noise_key(p.rng, row);
  Best choice{-infinity(), 0.0f, -1};
  for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) {
    const float z = load(p.logits, row, j);
    if (key_of(z, j) < threshold) continue;
    const Words4 high = noise_words(key, j, kTokenDrawHigh), low = noise_words(key, j, kTokenDrawLow);
    const float score =
        (z - top.score) * static_cast<float>(inverse) - logf(token_exponential(high.w[j % 4], low.w[j % 4]));
    choice = better(choice, {score, z, j});
  }
  choice = block_reduce(choice, [](Best a, Best b) { return better(a, b); });
  log_prob = static_cast<float>(static_cast<double>(choice.logit - top.score) * inverse - log(total));
  return choice.column;
}

__global__ void __launch_bounds__(kThreads) topk_sample_kernel(TopkSampleParams p, bool) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    float log_prob;
    const int64_t token = draw_token(p, row, log_prob);
    if (threadIdx.x == 0) {
      p.token[row] = token;
      if (p.log_prob != nullptr) p.log_prob[row] = log_prob;
    }
  }
}

template <class Out>
__global__ void __launch_bounds__(kThreads, 2) topk_renoise_kernel(TopkRenoiseParams p, bool keep) {
  auto* kept = keep ? reinterpret_cast<typename Kept<Out>::Type*>(shared_memory() + kSharedBytes) : nullptr;
  const TopkSampleParams& s = p.sample;
  for (int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    float log_prob;
    const int64_t token = draw_token(s, row, log_prob);
    if (threadIdx.x == 0) {
      s.token[row] = token;
      if (s.log_prob != nullptr) s.log_prob[row] = log_prob;
    }
    if (is_given(s.given, row))
      store_onehot(p.out, row, s.vocab, token, false);
    else  // token -1 gives a row of NaN
      noise_interpolate_row(row_of<Out>(p.out, row), s.vocab, noise_key(s.rng, row), token,
                            scalar_at(p.t_next, row, 0.0f), p.c, false, kept);
  }
}

}  // namespace klflow::cuda
