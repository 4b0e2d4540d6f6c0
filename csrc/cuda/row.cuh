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

// The dynamic shared memory begins with the partial results of a reduction; then comes what the kernel itself lays out.
constexpr int kSlotBytes = 32;
constexpr int kRoundKeys = kWarps * kSlotBytes + kSlotBytes;            // after the block's own result, for its cluster
constexpr int kPartialBytes = kRoundKeys + 20 * sizeof(uint32_t) + 16;  // and the round keys of a row's noise

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// ---- a cluster of blocks handles a row, each block a slice of its columns (cluster of one: the whole row)
struct Slice {
  int begin, size;
};
__device__ __forceinline__ Slice slice_of(int64_t vocab) {
  const int columns = static_cast<int>(vocab), blocks = static_cast<int>(cluster_size());
  const int share = ((columns + 7) / 8 + blocks - 1) / blocks * 8, begin = share * static_cast<int>(cluster_rank());
  return {begin, begin + share < columns ? share : begin < columns ? columns - begin : 0};
}
__device__ __forceinline__ int64_t first_row() { return blockIdx.x / cluster_size(); }
__device__ __forceinline__ int64_t row_step() { return gridDim.x / cluster_size(); }
__device__ __forceinline__ bool is_leader() { return threadIdx.x == 0 && cluster_rank() == 0; }

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

// ---- vectors of 8 columns (numbered by int: V < 2^31), read and written 16 bytes at a time whatever the row's
// alignment
constexpr int kVector = 8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct alignas(16) Vector {
  T element[kVector];
};
// The same as the 16-byte words that are read and written.
template <class T>
union VectorWords {
  Vector<T> vector;
  Words16 part[sizeof(Vector<T>) / 16];
  __device__ __forceinline__ VectorWords() {}
};
template <class T>
__device__ __forceinline__ Vector<T> load_aligned(const T* address) {
  VectorWords<T> x;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
    x.part[i] = load16(reinterpret_cast<const Words16*>(address) + i);
  return x.vector;
}
template <class T>
__device__ __forceinline__ void store_aligned(T* address, const Vector<T>& vector) {
  VectorWords<T> x;
  x.vector = vector;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
    store16(reinterpret_cast<Words16*>(address) + i, x.part[i]);
}

// Columns [column, column + 8) of a row; those outside [0, vocab) are fill. An unaligned vector inside the row is two
// (float32: three) aligned loads and a shift, so a thread's columns, and the order of every sum, depend on the column
// index alone. Nothing outside the row is touched.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int column, int vocab, T fill) {
  constexpr int kParts = sizeof(Vector<T>) / 16;
  const T* address = row + column;
  const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) & 15);
  if (shift == 0 && column >= 0 && column + kVector <= vocab) return load_aligned(address);
  const int before = static_cast<int>(shift / sizeof(T)), window = (kParts + 1) * 16 / static_cast<int>(sizeof(T));
  if (column - before >= 0 && column - before + window <= vocab) {
    const Words16* aligned = reinterpret_cast<const Words16*>(address - before);
    uint32_t w[4 * (kParts + 1)];
#pragma unroll
    for (int part = 0; part <= kParts; ++part) {
      const Words16 words = load16(aligned + part);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[4 * part + i] = words.w[i];
    }
#pragma unroll
    for (int i = 0; i < 4 * kParts + 2; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 4 * kParts + 1; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
    VectorWords<T> result;
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i)
      result.part[i / 4].w[i % 4] = sizeof(T) == 4 ? w[i] : __funnelshift_r(w[i], w[i + 1], (shift & 2) * 8);
    return result.vector;
  }
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.element[i] = column + i >= 0 && column + i < vocab ? address[i] : fill;
  return result;
}

// Writes a whole row, values(column, v) giving the 8 floats from `column` on (it may begin before 0 or end after V): 16
// bytes at a time inside the row, single elements at its two ends.
template <class T, class Values>
__device__ __forceinline__ void store_row(T* row, int vocab, Values&& values) {
  const int past = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  for (int column = kVector * static_cast<int>(threadIdx.x) - past; column < vocab; column += kVector * kThreads) {
    float v[kVector];
    values(column, v);
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.element[i] = from_float<T>(v[i]);
    if (column >= 0 && column + kVector <= vocab) {
      VectorWords<T> words;
      words.vector = result;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
        store16_global(reinterpret_cast<Words16*>(row + column) + i, words.part[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (column + i >= 0 && column + i < vocab) row[column + i] = result.element[i];
    }
  }
}

// A vector of a float32 row kept in shared memory, at its column index.
__device__ __forceinline__ void store_kept(float* kept, int column, const float (&values)[kVector]) {
  Vector<float> vector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) vector.element[i] = values[i];
  store_aligned(kept + column, vector);
}
__device__ __forceinline__ void load_kept(const float* kept, int column, int vocab, float (&values)[kVector]) {
  const Vector<float> vector = load_vector<float>(kept, column, vocab, 0.0f);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = vector.element[i];
}

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// Exactly onehot(token), or its logarithm; a token outside [0, V) gives a row of NaN.
__device__ __forceinline__ void store_onehot(const Rows& out, int64_t row, int64_t vocab, int64_t token, bool log) {
  const bool valid = token >= 0 && token < vocab;
  const Slice slice = slice_of(vocab);
  for (int64_t j = slice.begin + threadIdx.x; j < slice.begin + slice.size; j += kThreads) {
    const float own = log ? 0.0f : 1.0f, other = log ? -infinity() : 0.0f;
    store(out, row, j, !valid ? not_a_number() : j == token ? own : other);
  }
}

// Larger values have larger ordered bits.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 counts as 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of_bits(uint32_t ordered) {
  return __int_as_float(static_cast<int32_t>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered));
}

// ---- reductions over the cluster: a fixed tree over its blocks and their warps, the result in every thread. unrolled:
// all warps' results are read into registers at once, of which a large T may leave too few.
template <bool clustered = true, bool unrolled = true, class T, class Combine>
__device__ __forceinline__ T row_reduce(T value, Combine combine) {
  static_assert(sizeof(T) <= kSlotBytes);
  T* partial = reinterpret_cast<T*>(shared_memory());
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, value.shuffle_down(offset));
  __syncthreads();  // the previous reduction's results have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T total = partial[0];
  if constexpr (unrolled) {
    for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp]);
  } else {
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp]);
  }
  if (clustered && cluster_size() > 1) {
    unsigned char* slot = shared_memory() + kWarps * kSlotBytes;
    if (threadIdx.x == 0) *reinterpret_cast<T*>(slot) = total;
    klflow_cluster_sync();
    total = *reinterpret_cast<const T*>(map_shared(slot, 0));
    for (uint32_t rank = 1; rank < cluster_size(); ++rank)
      total = combine(total, *reinterpret_cast<const T*>(map_shared(slot, rank)));
    klflow_cluster_sync();  // read by all before the next reduction, or the end of a block
  }
  return total;
}

struct Sum {
  double value;
  __device__ __forceinline__ Sum shuffle_down(int offset) const { return {__shfl_down_sync(~0u, value, offset)}; }
};
template <bool clustered = true>
__device__ __forceinline__ double row_sum(double value) {
  return row_reduce<clustered>(Sum{value}, [](Sum a, Sum b) { return Sum{a.value + b.value}; }).value;
}

// total * exp(scale * shift): a sum of exponentials of scale * z that never overflows. The shift is some z, subtracted
// before anything is multiplied, so that a common offset, and masks of any size, leave the differences as they are. NaN
// and +infinity end as NaN, as in torch.
struct ExpSum {
  float shift, total;
  __device__ __forceinline__ ExpSum shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, shift, offset), __shfl_down_sync(~0u, total, offset)};
  }
  __device__ __forceinline__ void add(const float (&z)[kVector], float scale = 1.0f) {
    float top = shift;
#pragma unroll
    for (int i = 0; i < kVector; ++i) top = fmaxf(top, z[i]);  // a NaN is passed over here and met below
    if (top > shift) {
      if (shift != -infinity()) total *= __expf((shift - top) * scale);
      shift = top;
    }
    const float base = top == -infinity() ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += __expf((z[i] - base) * scale);
  }
};
__device__ __forceinline__ ExpSum combine(ExpSum a, ExpSum b, float scale) {
  if (a.shift == -infinity()) return {b.shift, a.total + b.total};  // totals of nothing are 0, of NaN alone NaN
  if (b.shift == -infinity()) return {a.shift, a.total + b.total};
  const float shift = fmaxf(a.shift, b.shift);
  return {shift, a.total * expf((a.shift - shift) * scale) + b.total * expf((b.shift - shift) * scale)};
}
__device__ __forceinline__ ExpSum empty_sum() { return {-infinity(), 0.0f}; }
// Of the whole row. exp(scale * z - lse) is exp(scale * (z - shift)) / total.
__device__ __forceinline__ ExpSum row_exp_sum(ExpSum mine, float scale = 1.0f) {
  return row_reduce(mine, [scale](ExpSum a, ExpSum b) { return combine(a, b, scale); });
}

// ---- noise
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
