// A tile of the rows that noise_embedding multiplies by the weight, straight from the noise contract: y (and its sum)
// or the posterior q or log q (NoiseTileParams in common/params.h). A warp makes a row of the tile, so that narrow
// tiles leave no thread idle and no barrier is needed. Never materialised: more of a row than the tile; x_0, l_t,
// evidence. Bytes: one write of the tile, which stays in L2. Bound: instructions, about 30 an element.
#pragma once

#include "evidence.cuh"

namespace klflow::cuda {

constexpr int kWarpKeys = 80;  // bytes of a row's round keys
constexpr int kTileBytes = kWarps * kWarpKeys;

template <class T>
__device__ __forceinline__ void store_vector(T* address, const float (&values)[kVector], int count, bool aligned) {
  VectorWords<T> words;
#pragma unroll
  for (int i = 0; i < kVector; ++i) words.vector.element[i] = from_float<T>(values[i]);
  if (aligned && count >= kVector) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
      store16_global(reinterpret_cast<Words16*>(address) + i, words.part[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (i < count) address[i] = words.vector.element[i];
  }
}

// Writes values(column of the row, v), 8 at a time.
template <class T, class Values>
__device__ __forceinline__ void store_tile_row(T* out, int64_t columns, int lane, Values&& values) {
  const bool aligned = (reinterpret_cast<uintptr_t>(out) & 15) == 0;
  for (int column = kVector * lane; column < columns; column += kVector * 32) {
    float v[kVector];
    values(column, v);
    store_vector(out + column, v, static_cast<int>(columns) - column, aligned);
  }
}

template <class Out, bool kPosterior, bool kLog>
__global__ void __launch_bounds__(kThreads, 2) noise_tile_kernel(NoiseTileParams p, bool) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  unsigned char* stored_keys = shared_memory() + kWarpKeys * warp;
  const SharedAddress round_keys = shared_address(stored_keys);
  const int first = static_cast<int>(p.column);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp; row < p.rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    Out* out = row_of<Out>(p.out, row);
    const int64_t token = p.target.at(row);
    const int own = static_cast<int>(token) - first;  // the token's column of the tile
    const float t = p.t.at(row);
    const bool valid = token >= 0 && token < p.vocab && t >= 0.0f && t <= 1.0f;
    const float gain = gain_of(t, p.c);
    if (!valid || p.given.at(row) || (kPosterior && !(gain <= kMostGain))) {
      store_tile_row(out, p.columns, lane, [&](int column, float (&v)[kVector]) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          v[i] = !valid ? not_a_number() : column + i == own ? (kLog ? 0.0f : 1.0f) : (kLog ? -infinity() : 0.0f);
      });
      if (!kPosterior && lane == 0) p.sum[row] += !valid ? not_a_number() : own >= 0 && own < p.columns ? 1.0 : 0.0;
      continue;
    }
    const NoiseKey key = noise_key(p.rng, row);
    __syncwarp();  // the previous row's keys have been read
    store_round_keys(key, stored_keys, lane);
    __syncwarp();
    auto words_of = [&](int column) { return row_noise_words(first + column, round_keys); };
    const float own_noise = exact_noise(words_of(own), token);
    if (kPosterior) {
      const float* stats = p.stats + 3 * row;
      const Evidence evidence(split_of_noise(stats[0], own_noise, gain, gain), gain, p.vocab);
      const float shift = stats[1], inverse = 1.0f / stats[2], log_total = kLog ? logf(stats[2]) : 0.0f;
      auto result = [&](float z) { return kLog ? z - shift - log_total : mass_of(z, shift) * inverse; };
      const float* log_prior = p.log_prior + first;
      const float own_q = own >= 0 && own < p.columns ? result(log_prior[own] + evidence.own) : 0.0f;
      if (p.vocab <= kNarrow) {
        for (int column = lane; column < p.columns; column += 32) {
          const float noise = exact_noise(words_of(column), column);
          const float q = result(log_prior[column] + evidence.narrow(noise));
          out[column] = from_float<Out>(column == own ? own_q : q);
        }
      } else {
        store_tile_row(out, p.columns, lane, [&](int column, float (&v)[kVector]) {
          const Vector<float> prior = load_vector<float>(log_prior, column, static_cast<int>(p.columns), 0.0f);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Words4 words = words_of(column + 4 * half);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float z = evidence.posterior(exponential_noise(words.w[i]), prior.element[4 * half + i]);
              v[4 * half + i] = result(z);
            }
          }
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            if (column + i == own) v[i] = own_q;
        });
      }
    } else {
      constexpr bool coarse = sizeof(typename Kept<Out>::Type) == 2;
      const float power = 1.0f - t, shift = power * -0.52876637f;  // log2(ln 2)
      const float own_y = expf(power * logf(own_noise) + t * p.c);
      double sum = 0.0;
      store_tile_row(out, p.columns, lane, [&](int column, float (&v)[kVector]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Words4 words = words_of(column + 4 * half);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            v[4 * half + i] = ex2_approx(power * log2_noise<coarse, true>(words.w[i]) + shift);
        }
        float partial = 0.0f;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (column + i == own) v[i] = own_y;
          partial += column + i < p.columns ? v[i] : 0.0f;
        }
        sum += partial;
      });
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      if (lane == 0) p.sum[row] += sum;
    }
  }
}

}  // namespace klflow::cuda
