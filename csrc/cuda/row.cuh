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
// bfloat16 and 11 bits are enough, float16 scaled by 2^10 (holding E from 6e-8 to 22.9 as normal numbers). Not of log
// x, which cancels near 0.
template <class Out, bool log = false>
struct Kept {
  using Type = float;
  static constexpr float kLog2Scale = 0.0f;
};
template <>
struct Kept<__nv_bfloat16, false> {
  using Type = __half;
  static constexpr float kLog2Scale = 10.0f;
};

constexpr float kLn2 = 0.6931471805599453f;

// One row of noise_interpolate: y_j = E_j^(1 - t) (log: its logarithm) is kept in shared memory, from byte `room` on,
// between the sum and the scaled store; where the row is too long to keep the noise is made again. Nothing but x_t
// touches global memory. The token's column is made like any other; its boost is added to the sum, and its result is
// written at the end. A row in which some U is clamped, one in 670 of 50,000 columns, is made again, column by column.
template <bool log, int room, class Out>
__device__ __forceinline__ void noise_interpolate_row(Out* row, int64_t vocab, const NoiseKey& key, int64_t token,
                                                      float t, float c, bool keep) {
  using K = typename Kept<Out, log>::Type;
  const Slice slice = slice_of(vocab);  // columns below are of the slice
  Out* out = row + slice.begin;
  if (token < 0 || token >= vocab || !(t >= 0.0f && t <= 1.0f)) {
    write_row(
        out, slice.size,
        [](int, float (&v)[kVector]) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) v[i] = not_a_number();
        },
        [](int) { return not_a_number(); });
    return;
  }
  K* kept = reinterpret_cast<K*>(shared_memory() + room);
  constexpr bool coarse = sizeof(K) == 2;
  const float power = 1.0f - t, shift = Kept<Out, log>::kLog2Scale;  // y is scaled by 2^shift
  store_round_keys(key);
  auto exponent_at = [&](int column) {  // of the row
    return power * log2_noise<coarse, true>(word_at(row_noise_words(column), column)) + shift;
  };
  auto to_keep = [](float exponent, float y) { return from_float<K>(log ? exponent * kLn2 : y); };
  const float own_exponent = exponent_at(static_cast<int>(token)), own_log = own_exponent * kLn2 + t * c;
  const double boosted = exp(static_cast<double>(own_log)) - ex2_approx(own_exponent);
  auto make_single = [&](int column) {  // of the slice
    const float exponent = exponent_at(slice.begin + column), y = ex2_approx(exponent);
    if (keep) kept[column] = to_keep(exponent, y);
    return y;
  };
  // Two vectors at a time; where the second is beyond the row's last whole one it counts for nothing.
  constexpr int kNext = kVector * kThreads;
  const SharedAddress round_keys = round_keys_of_row();
  SharedAddress place = shared_address(kept + kVector * threadIdx.x);
  float sum = 0.0f;
  for (int column = kVector * static_cast<int>(threadIdx.x); column + kVector <= slice.size; column += 2 * kNext) {
    const int first = slice.begin + column;
    const int columns[4] = {first, first + 4, first + kNext, first + kNext + 4};
    Words4 words[4];
    row_noise_words(columns, round_keys, words);
    float partial[2] = {0.0f, 0.0f};
    VectorWords<K> vector[2];
#pragma unroll
    for (int i = 0; i < 2 * kVector; ++i) {
      const float exponent = power * log2_noise<coarse, false>(words[i / 4].w[i % 4]) + shift, y = ex2_approx(exponent);
      partial[i / kVector] = i % kVector == 0 ? y : partial[i / kVector] + y;
      vector[i / kVector].vector.element[i % kVector] = to_keep(exponent, y);
    }
    const bool both = column + kNext + kVector <= slice.size;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Vector<K>) / 16); ++i) {
      store16_shared_if(keep, place + 16 * i, vector[0].part[i]);
      store16_shared_if(keep && both, place + 16 * i + kNext * sizeof(K), vector[1].part[i]);
    }
    place += 2 * kNext * sizeof(K);
    sum += partial[0];
    if (both) sum += partial[1];
  }
  const int last = slice.size / kVector * kVector + static_cast<int>(threadIdx.x);
  if (threadIdx.x < kVector && last < slice.size) sum += make_single(last);
  double total = row_sum(is_leader() ? sum + boosted : sum);  // its barriers also publish what is kept
  if (!(total == total)) {                                    // some word is so large that U is clamped
    sum = 0.0f;
    for (int column = static_cast<int>(threadIdx.x); column < slice.size; column += kThreads)
      sum += make_single(column);
    total = row_sum(is_leader() ? sum + boosted : sum);
  }
  const float scale = static_cast<float>(1.0 / total), log_total = static_cast<float>(::log(total));
  auto result = [&](float kept) { return log ? kept - log_total : kept * scale; };
  if (keep) {
    with_constant<0, kUnit<K> - 1>(first_vector(out) % kUnit<K>, [&](auto past) {
      write_vectors(out, slice.size, [&](int column, float (&v)[kVector]) {
        const Window<K, decltype(past)::value> window(kept + column);
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = result(window.at(i));
      });
    });
    write_ends(out, slice.size, [&](int column) { return result(to_float(kept[column])); });
  } else {
    for (int column = static_cast<int>(threadIdx.x); column < slice.size; column += kThreads) {
      const float exponent = exponent_at(slice.begin + column);
      out[column] = from_float<Out>(result(log ? exponent * kLn2 : ex2_approx(exponent)));
    }
  }
  __syncthreads();  // the next row writes what was read here, and the token's column has been written
  const int own_column = static_cast<int>(token) - slice.begin;
  if (threadIdx.x == 0 && own_column >= 0 && own_column < slice.size)
    out[own_column] = from_float<Out>(log ? own_log - log_total : expf(own_log - log_total));
}

}  // namespace klflow::cuda
