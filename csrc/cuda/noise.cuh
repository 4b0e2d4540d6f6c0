// The noise of a column: Philox words under the contract of common/philox.h, and exponentials of them.
#pragma once

#include "../common/params.h"
#include "../common/philox.h"
#include "block.cuh"

namespace klflow::cuda {

struct NoiseKey {
  uint32_t k0, k1, row, step;
};
__device__ __forceinline__ NoiseKey noise_key(const Rng& rng, int64_t row) {
  const Rng::State state = rng.at(row);
  return {static_cast<uint32_t>(state.seed), key_of_row(state.seed, state.row), static_cast<uint32_t>(state.row),
          static_cast<uint32_t>(state.step)};
}
__device__ __forceinline__ Words4 noise_words(const NoiseKey& key, int64_t column, uint32_t stream) {
  return philox(static_cast<uint32_t>(column) / 4, key.row, key.step, stream, key.k0, key.k1);
}

// The simplex noise words of 4 columns, with the round keys from shared memory: computing them again for every counter
// costs 5 instructions an element.
__device__ __forceinline__ void store_round_keys(const NoiseKey& key, unsigned char* round_keys, uint32_t thread) {
  uint32_t* keys = reinterpret_cast<uint32_t*>(round_keys);
  if (thread < 10) {
    keys[2 * thread] = key.k0 + thread * kPhiloxW0;
    keys[2 * thread + 1] = key.k1 + thread * kPhiloxW1;
  }
}
__device__ __forceinline__ void store_round_keys(const NoiseKey& key) {
  store_round_keys(key, shared_memory() + kRoundKeys, threadIdx.x);
  __syncthreads();
}
__device__ __forceinline__ Words4 row_noise_words(const NoiseKey& key, int column, const unsigned char* round_keys) {
  uint32_t c0 = static_cast<uint32_t>(column) / 4, c1 = key.row, c2 = key.step, c3 = kSimplexNoise;
#pragma unroll
  for (int pair = 0; pair < 5; ++pair) {
    const Words16 keys = load16(round_keys + 16 * pair);
#pragma unroll
    for (int round = 0; round < 2; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ keys.w[2 * round];
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ keys.w[2 * round + 1];
      c1 = static_cast<uint32_t>(p1);
      c3 = static_cast<uint32_t>(p0);
    }
  }
  return {{c0, c1, c2, c3}};
}
__device__ __forceinline__ Words4 row_noise_words(const NoiseKey& key, int column) {
  return row_noise_words(key, column, shared_memory() + kRoundKeys);
}

// log2 (E / ln 2), E = -log U, in two special-function operations; the constant cancels in every softmax. Near U = 1
// the first one's absolute error would be a large relative one, so there E comes from the series of -log(1 - v), v = 1
// - U exactly. Relative error of E: 3e-6; coarse, for results of 8 bits: 1e-4.
template <bool coarse>
__device__ __forceinline__ float log2_noise(uint32_t word) {
  const float u = simplex_uniform(word), v = 1.0f - u;
  const float series =
      coarse ? v * (1.442695f + v * 0.7213475f)
             : v * (1.442695f + v * (0.7213475f + v * (0.48089835f + v * (0.36067376f + v * 0.28853901f))));
  return lg2_approx(v < (coarse ? 0.015625f : 0.0625f) ? series : -lg2_approx(u));
}

// E itself, where its absolute error counts, in one special-function operation: error 2e-7 max(1, E).
__device__ __forceinline__ float exponential_noise(uint32_t word) {
  return -0.6931471805599453f * lg2_approx(simplex_uniform(word));
}

// One lane's word, by selection: an indexed array would live in local memory.
__device__ __forceinline__ uint32_t word_at(const Words4& words, int64_t column) {
  const uint32_t even = column & 2 ? words.w[2] : words.w[0], odd = column & 2 ? words.w[3] : words.w[1];
  return column & 1 ? odd : even;
}

}  // namespace klflow::cuda
