// What the row kernels share: element access in three dtypes, reductions over a block in a fixed order, a streaming
// logsumexp and the noise of a column. One block handles one row; a thread's columns depend on the column index alone,
// so a row has the same bits wherever it lies in the batch.
#pragma once

#include "device.cuh"

#include <cstdint>

#include "../common/params.h"
#include "../common/philox.h"

namespace klflow::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// The dynamic shared memory: partial results of a reduction, then the digit counts of the top-k.
constexpr int kPartialBytes = kWarps * 32;
constexpr int kSharedBytes = kPartialBytes + 256 * sizeof(uint32_t);

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// ---- rows of float32, bfloat16 or float16; the dtype is uniform over the grid
__device__ __forceinline__ float load(const Rows& rows, int64_t row, int64_t column) {
  const int64_t i = row * rows.stride + column;
  if (rows.dtype == kFloat32) return static_cast<const float*>(rows.data)[i];
  if (rows.dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(rows.data)[i]);
  return __half2float(static_cast<const __half*>(rows.data)[i]);
}
__device__ __forceinline__ void store(const Rows& rows, int64_t row, int64_t column, float x) {
  const int64_t i = row * rows.stride + column;
  if (rows.dtype == kFloat32)
    static_cast<float*>(rows.data)[i] = x;
  else if (rows.dtype == kBFloat16)
    static_cast<__nv_bfloat16*>(rows.data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(rows.data)[i] = __float2half_rn(x);
}
__device__ __forceinline__ int64_t token_at(const Tokens& tokens, int64_t row) {
  const int64_t i = row * tokens.stride;
  return tokens.is_int32 ? static_cast<const int32_t*>(tokens.data)[i] : static_cast<const int64_t*>(tokens.data)[i];
}
__device__ __forceinline__ bool is_given(const Given& given, int64_t row) {
  return given.flags != nullptr && given.flags[row * given.stride];
}
__device__ __forceinline__ float scalar_at(const Scalars& scalars, int64_t row, float absent) {
  return scalars.data != nullptr ? scalars.data[row * scalars.stride] : absent;
}

// Exactly onehot(token), or its logarithm; a token outside [0, V) gives a row of NaN.
__device__ __forceinline__ void store_onehot(const Rows& out, int64_t row, int64_t vocab, int64_t token, bool log) {
  const bool valid = token >= 0 && token < vocab;
  for (int64_t j = threadIdx.x; j < vocab; j += kThreads) {
    const float own = log ? 0.0f : 1.0f, other = log ? -infinity() : 0.0f;
    store(out, row, j, !valid ? not_a_number() : j == token ? own : other);
  }
}

// ---- reductions over the block: a fixed tree, the result in every thread
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine) {
  static_assert(sizeof(T) <= kPartialBytes / kWarps);
  T* partial = reinterpret_cast<T*>(shared_memory());
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, value.shuffle_down(offset));
  __syncthreads();  // the previous reduction's results have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T total = partial[0];
  for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp]);
  return total;
}

struct Sum {
  double value;
  __device__ __forceinline__ Sum shuffle_down(int offset) const { return {__shfl_down_sync(~0u, value, offset)}; }
};
__device__ __forceinline__ double block_sum(double value) {
  return block_reduce(Sum{value}, [](Sum a, Sum b) { return Sum{a.value + b.value}; }).value;
}

// total * exp(shift): a sum of exponentials that never overflows. NaN and +infinity end as NaN, as in torch.
struct ExpSum {
  float shift, total;
  __device__ __forceinline__ ExpSum shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, shift, offset), __shfl_down_sync(~0u, total, offset)};
  }
  __device__ __forceinline__ void add(float z) {
    if (z > shift) {
      total = total * expf(shift - z) + 1.0f;
      shift = z;
    } else if (z != -infinity()) {
      total += expf(z - shift);
    }
  }
};
__device__ __forceinline__ ExpSum combine(ExpSum a, ExpSum b) {
  if (a.shift == -infinity()) return {b.shift, a.total + b.total};  // totals of nothing are 0, of NaN alone NaN
  if (b.shift == -infinity()) return {a.shift, a.total + b.total};
  const float shift = fmaxf(a.shift, b.shift);
  return {shift, a.total * expf(a.shift - shift) + b.total * expf(b.shift - shift)};
}
__device__ __forceinline__ ExpSum empty_sum() { return {-infinity(), 0.0f}; }
__device__ __forceinline__ float block_lse(ExpSum mine) {
  const ExpSum all = block_reduce(mine, [](ExpSum a, ExpSum b) { return combine(a, b); });
  return all.total == 0.0f ? all.shift : all.shift + logf(all.total);
}

// ---- noise
struct NoiseKey {
  uint32_t k0, k1, row, step;
};
__device__ __forceinline__ NoiseKey noise_key(const Rng& rng, int64_t row) {
  const int64_t* pair = rng.data + row * rng.stride;
  const uint64_t seed = static_cast<uint64_t>(pair[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(row + rng.row_offset),
          static_cast<uint32_t>(pair[1])};
}
__device__ __forceinline__ Words4 noise_words(const NoiseKey& key, int64_t column, uint32_t stream) {
  return philox(static_cast<uint32_t>(column / 4), key.row, key.step, stream, key.k0, key.k1);
}

// One row of noise_interpolate. Two passes over the noise, the second regenerated: nothing but x_t touches memory.
__device__ __forceinline__ void noise_interpolate_row(const Rows& out, int64_t row, int64_t vocab, const NoiseKey& key,
                                                      int64_t token, float t, float c, bool log) {
  if (token < 0 || token >= vocab || !(t >= 0.0f && t <= 1.0f)) {
    for (int64_t j = threadIdx.x; j < vocab; j += kThreads) store(out, row, j, not_a_number());
    return;
  }
  const float power = 1.0f - t;
  double sum = 0.0;
  for (int64_t column = 4 * static_cast<int64_t>(threadIdx.x); column < vocab; column += 4 * kThreads) {
    const Words4 words = noise_words(key, column, kSimplexNoise);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const float y = exp2f(power * log2f(-logf(simplex_uniform(words.w[lane]))));
      if (column + lane < vocab) sum += column + lane == token ? y * exp(static_cast<double>(t) * c) : y;
    }
  }
  const double total = block_sum(sum);
  const float scale = static_cast<float>(1.0 / total), log_total = static_cast<float>(::log(total));
  for (int64_t column = 4 * static_cast<int64_t>(threadIdx.x); column < vocab; column += 4 * kThreads) {
    const Words4 words = noise_words(key, column, kSimplexNoise);
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t j = column + lane;
      if (j >= vocab) continue;
      const float log_e = logf(-logf(simplex_uniform(words.w[lane])));
      const float boost = j == token ? t * c : 0.0f;
      if (log)
        store(out, row, j, power * log_e + boost - log_total);
      else if (j == token)
        store(out, row, j, expf(power * log_e + boost - log_total));
      else
        store(out, row, j, exp2f(power * log2f(-logf(simplex_uniform(words.w[lane])))) * scale);
    }
  }
}

}  // namespace klflow::cuda
