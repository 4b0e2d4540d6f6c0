// A whole row: noisy, or onehot. One block, or one cluster, handles it; a thread's columns depend on the column index
// alone.
#pragma once

#include "noise.cuh"
#include "reduce.cuh"
#include "vector.cuh"

namespace klflow::cuda {

// Exactly onehot(token), or its logarithm; a token outside [0, V) gives a row of NaN.
__device__ __forceinline__ void store_onehot(const Rows& out, int64_t row, int64_t vocab, int64_t token, bool log) {
  const bool valid = token >= 0 && token < vocab;
  const Slice slice = slice_of(vocab);
  for (int64_t j = slice.begin + threadIdx.x; j < slice.begin + slice.size; j += kThreads) {
    const float own = log ? 0.0f : 1.0f, other = log ? -infinity() : 0.0f;
    store(out, row, j, !valid ? not_a_number() : j == token ? own : other);
  }
}

// What the two passes of noise_interpolate_row keep of an element in shared memory: float32, or, where the output is
// bfloat16 and 11 bits are enough, float16 scaled by 2^10 (holding E from 6e-8 to 22.9 as normal numbers).
template <class Out>
struct Kept {
  using Type = float;
  static constexpr float kLog2Scale = 0.0f;
};
template <>
struct Kept<__nv_bfloat16> {
  using Type = __half;
  static constexpr float kLog2Scale = 10.0f;
};

// One row of noise_interpolate: y_j = E_j^(1 - t) (log: its logarithm) is kept in shared memory between the sum and the
// scaled store; where the row is too long to keep (kept == null) the noise is made again. Nothing but x_t touches
// global memory.
template <bool log, class Out>
__device__ __forceinline__ void noise_interpolate_row(Out* row, int64_t vocab, const NoiseKey& key, int64_t token,
                                                      float t, float c, typename Kept<Out>::Type* kept) {
  using K = typename Kept<Out>::Type;
  const Slice slice = slice_of(vocab);  // columns below are of the slice
  Out* out = row + slice.begin;
  if (token < 0 || token >= vocab || !(t >= 0.0f && t <= 1.0f)) {
    store_row(out, slice.size, [&](int, float (&v)[kVector]) {
      for (float& x : v) x = not_a_number();
    });
    return;
  }
  const float power = 1.0f - t, shift = log ? 0.0f : Kept<Out>::kLog2Scale;  // y is scaled by 2^shift
  constexpr bool coarse = sizeof(K) == 2 && !log;
  store_round_keys(key);
  auto log2_e = [&](int column) {  // of one column
    return log2_noise<coarse>(word_at(row_noise_words(key, column), column));
  };
  double sum = 0.0;
  const int last = slice.size, own_column = static_cast<int>(token) - slice.begin;
  for (int column = kVector * static_cast<int>(threadIdx.x); column < last; column += kVector * kThreads) {
    Vector<K> keep;
    float y[kVector];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Words4 words = row_noise_words(key, slice.begin + column + 4 * half);
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) {
        const int i = 4 * half + lane;
        const float exponent = power * log2_noise<coarse>(words.w[lane]) + shift;
        y[i] = ex2_approx(exponent);
        keep.element[i] = from_float<K>(log ? exponent * 0.6931471805599453f : y[i]);
      }
    }
    if (column / kVector == own_column / kVector || column + kVector > last) {  // few vectors hold what does not count
#pragma unroll
      for (int i = 0; i < kVector; ++i) y[i] = column + i < last && column + i != own_column ? y[i] : 0.0f;
    }
    float partial = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) partial += y[i];
    sum += partial;
    if (kept != nullptr) store_aligned(kept + column, keep);
  }
  const float own_log = (power * log2_e(static_cast<int>(token)) + shift) * 0.6931471805599453f + t * c;
  if (threadIdx.x == 0 && slice.begin == 0) sum += exp(static_cast<double>(own_log));
  const double total = row_sum(sum);  // its barriers also publish what is kept
  const float scale = static_cast<float>(1.0 / total), log_total = static_cast<float>(::log(total));
  const float own = log ? own_log - log_total : expf(own_log - log_total);
  store_row(out, slice.size, [&](int column, float (&v)[kVector]) {
    if (kept != nullptr) {
      const Vector<K> keep = load_vector<K>(kept, column, slice.size, from_float<K>(0.0f));
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        v[i] = log ? to_float(keep.element[i]) - log_total : to_float(keep.element[i]) * scale;
    } else {
      for (int i = 0; i < kVector; ++i) {
        const int j = column + i;
        const float exponent = j >= 0 && j < slice.size ? power * log2_e(slice.begin + j) + shift : 0.0f;
        v[i] = log ? exponent * 0.6931471805599453f - log_total : ex2_approx(exponent) * scale;
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      if (column + i == own_column) v[i] = own;
  });
  __syncthreads();  // the next row writes what was read here
}

}  // namespace klflow::cuda
