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

// The simplex noise words of 4 columns. What of them the row alone decides lies in shared memory, made once: the round
// keys, with what the first three rounds have of row and step.
__device__ __forceinline__ void store_round_keys(const NoiseKey& key, unsigned char* round_keys, uint32_t thread) {
  uint32_t* keys = reinterpret_cast<uint32_t*>(round_keys);
  if (thread < 10) {
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * key.step;
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(p1 >> 32) ^ key.row ^ key.k0);
    const uint32_t low = thread == 1 ? static_cast<uint32_t>(p1) : 0;
    const uint32_t high = thread == 0   ? static_cast<uint32_t>(kSimplexNoise)
                          : thread == 1 ? static_cast<uint32_t>(p0 >> 32)
                          : thread == 2 ? static_cast<uint32_t>(p0)
                                        : 0;
    keys[2 * thread] = (key.k0 + thread * kPhiloxW0) ^ low;
    keys[2 * thread + 1] = (key.k1 + thread * kPhiloxW1) ^ high;
  }
}
__device__ __forceinline__ void store_round_keys(const NoiseKey& key) {
  store_round_keys(key, shared_memory() + kRoundKeys, static_cast<uint32_t>(thread_of_row()));
  __syncthreads();
}
// Of several quads of columns at once, which read the keys once.
template <int quads>
__device__ __forceinline__ void row_noise_words(const int (&column)[quads], SharedAddress round_keys,
                                                Words4 (&words)[quads]) {
#pragma unroll
  for (int pair = 0; pair < 5; ++pair) {  // of rounds
    const Words16 keys = load16_shared(round_keys + 16 * pair);
#pragma unroll
    for (int quad = 0; quad < quads; ++quad) {
      uint32_t (&c)[4] = words[quad].w;
      if (pair == 0) {
        const uint64_t first = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(column[quad]) / 4);
        const uint64_t second = static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(first >> 32) ^ keys.w[1]);
        c[0] = static_cast<uint32_t>(second >> 32) ^ keys.w[2];
        c[1] = static_cast<uint32_t>(second);
        c[2] = static_cast<uint32_t>(first) ^ keys.w[3];
        c[3] = 0;
        continue;
      }
#pragma unroll
      for (int round = 0; round < 2; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c[0], p1 = static_cast<uint64_t>(kPhiloxM1) * c[2];
        c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ keys.w[2 * round];
        c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ keys.w[2 * round + 1];
        c[1] = static_cast<uint32_t>(p1);
        c[3] = static_cast<uint32_t>(p0);
      }
    }
  }
}
__device__ __forceinline__ SharedAddress round_keys_of_row() { return shared_address(shared_memory() + kRoundKeys); }
__device__ __forceinline__ Words4 row_noise_words(int column, SharedAddress round_keys) {
  Words4 words[1];
  const int columns[1] = {column};
  row_noise_words(columns, round_keys, words);
  return words[0];
}
__device__ __forceinline__ Words4 row_noise_words(int column) { return row_noise_words(column, round_keys_of_row()); }

// log2 (E / ln 2), E = -log U, in two special-function operations; the constant cancels in every softmax. Near U = 1
// the first one's absolute error would be a large relative one, so there E comes from the series of -log(1 - v), v = 1
// - U exactly. Relative error of E: 3e-6; coarse, for results of 8 bits: 1e-4. clamped: U is at most 1 - 2^-24, as the
// contract has it; otherwise a word of which that counts, one in 2^25, gives NaN.
template <bool coarse, bool clamped>
__device__ __forceinline__ float log2_noise(uint32_t word) {
  const float u = clamped ? simplex_uniform(word) : unclamped_uniform(word), v = 1.0f - u;
  const float slope = coarse ? 1.442695f + v * 0.7213475f
                             : 1.442695f + v * (0.7213475f + v * (0.48089835f + v * (0.36067376f + v * 0.28853901f)));
  float minus = lg2_approx(u);
  if (v < (coarse ? 0.015625f : 0.0625f))
    minus = 1e-14f - v * slope;  // 1e-14: positive, so that its lg2 is NaN, at v = 0
  return lg2_approx(-minus);
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
