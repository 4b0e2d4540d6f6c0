// Pieces that the CPU ops share: walking a row in blocks that stay in cache, a streaming logsumexp, the noise of a row,
// and the final scaled store. Every sum runs in column order with double block totals: same row, same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "simd.h"

namespace klflow::KLFLOW_ISA {

constexpr int64_t kBlock = 2048;  // columns handled at a time: 8 KB of float32, in L1

// A float32 view of columns [begin, begin + n) of a row: the row itself, or its conversion in `buffer`.
KLFLOW_INLINE const float* block_of(const float* row, int64_t begin, int64_t, float*) { return row + begin; }
template <class T>
KLFLOW_INLINE const float* block_of(const T* row, int64_t begin, int64_t n, float* buffer) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(buffer + i, load(row + begin + i));
  if (i < n) store(buffer + i, load_tail(row + begin + i, static_cast<int>(n - i), 0.0f));
  return buffer;
}

// Calls f(offset, n) on whole vectors, then f_tail on what is left.
template <class F>
KLFLOW_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}
template <class T>
KLFLOW_INLINE vf load_n(const T* p, int n, float fill) {
  return n == kLanes ? load(p) : load_tail(p, n, fill);
}
template <class T>
KLFLOW_INLINE void store_n(T* p, vf v, int n) {
  if (n == kLanes)
    store(p, v);
  else
    store_tail(p, v, n);
}

// sum_j exp(z_j) = total * exp(shift) over the blocks seen so far. The shift is not the exact maximum: it only has to
// stay within a safe distance of it, so one pass per block is enough except when a block raises the maximum by a lot.
struct StreamingSum {
  float shift = -kInf;
  double total = 0.0;

  void add(const float* z, int64_t n, float scale) {  // of scale * z
    if (shift == -kInf) {
      float top = block_max(z, n, scale);
      if (top == -kInf) {  // nothing above -infinity yet, or only NaN
        for (int64_t i = 0; i < n; ++i) total += z[i] == z[i] ? 0.0 : kNaN;
        return;
      }
      shift = top;
    }
    float top;
    double sum = block_sum(z, n, scale, top);
    if (top > shift + 40.0f) {
      total *= std::exp(static_cast<double>(shift) - top);
      shift = top;
      sum = block_sum(z, n, scale, top);
    }
    total += sum;
  }
  float lse() const { return total == 0.0 ? shift : static_cast<float>(shift + std::log(total)); }

 private:
  static float block_max(const float* z, int64_t n, float scale) {
    vf top = splat(-kInf);
    for_vectors(n, [&](int64_t i, int m) { top = maximum(load_n(z + i, m, -kInf) * scale, top); });
    return max_lanes(top);
  }
  double block_sum(const float* z, int64_t n, float scale, float& top_out) const {
    // Four chains hide the latency of the additions; the split depends on the column alone.
    vf sums[4] = {}, tops[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf v = load(z + i + j * kLanes) * scale;
        tops[j] = maximum(v, tops[j]);
        sums[j] += expv(v - shift);
      }
    }
    for_vectors(n - i, [&](int64_t k, int m) {
      const vf v = load_n(z + i + k, m, -kInf) * scale;
      tops[0] = maximum(v, tops[0]);
      const vf e = expv(v - shift);
      sums[0] += m == kLanes ? e : (v == -kInf ? vf{} : e);
    });
    top_out = max_lanes(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
    return static_cast<double>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
};

// Fills y with the unnormalised noisy row E_j^(1 - t) (or, with log, with (1 - t) log2 E_j) and returns the sum of
// E_j^(1 - t). E is in units of ln 2, a factor that the normalisation removes. y has room for kNoiseColumns more.
template <bool kLog>
double noise_row(const PhiloxKey& key, int64_t vocab, float one_minus_t, float* y) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = std::min(vocab, begin + kBlock);
    vf sums[kChains] = {};
    for (int64_t column = begin; column < end; column += kNoiseColumns) {
      vu words[2 * kChains];
      philox_words(key, column, words);
      vf powers[2 * kChains];
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        vf* v = powers + half * kChains;
        each_chain([&](int i) { v[i] = simplex_uniformv(words[half * kChains + i]); });
        log2_chains(v);
        each_chain([&](int i) { v[i] = -v[i]; });  // E, in [8.6e-8, 33]
        log2_chains(v);
        each_chain([&](int i) { v[i] *= one_minus_t; });
        float* out = y + column + half * kChains * kLanes;
        if constexpr (kLog) each_chain([&](int i) { store(out + i * kLanes, v[i]); });
        exp2_chains(v);
        if constexpr (!kLog) each_chain([&](int i) { store(out + i * kLanes, v[i]); });
      }
      const int64_t left = end - column;
      if (left < kNoiseColumns) {  // the columns past the end of the row do not count
        float lanes[kNoiseColumns];
        for (int i = 0; i < 2 * kChains; ++i) store(lanes + i * kLanes, powers[i]);
        std::fill(lanes + left, lanes + kNoiseColumns, 0.0f);
        for (int i = 0; i < 2 * kChains; ++i) powers[i] = load(lanes + i * kLanes);
      }
      each_chain([&](int i) { sums[i] += powers[i] + powers[kChains + i]; });
    }
    for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
    total += static_cast<double>(sum_lanes(sums[0]));
  }
  return total;
}

inline PhiloxKey philox_key(const Rng& rng, int64_t row, uint32_t stream) {
  const int64_t* pair = rng.data + row * rng.stride;
  return {static_cast<uint64_t>(pair[0]), static_cast<uint32_t>(row + rng.row_offset), static_cast<uint32_t>(pair[1]),
          stream};
}

inline int64_t token_at(const Tokens& tokens, int64_t row) {
  return tokens.is_int32 ? static_cast<const int32_t*>(tokens.data)[row * tokens.stride]
                         : static_cast<const int64_t*>(tokens.data)[row * tokens.stride];
}

template <class T>
T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// The scratch row of this thread, kept between calls (a fresh one would cost page faults).
inline float* scratch_row(int64_t columns) {
  thread_local std::unique_ptr<float[]> buffer;
  thread_local int64_t size = 0;
  const int64_t wanted = columns + 2 * kNoiseColumns;
  if (size < wanted) {
    buffer.reset(new float[wanted]);
    size = wanted;
  }
  return buffer.get();
}

template <class T>
KLFLOW_INLINE T from_float(float x) {
  T lanes[kLanes];
  store(lanes, splat(x));
  return lanes[0];
}

// out = y * factor + offset.
template <class T>
void store_row(T* out, const float* y, int64_t n, float factor, float offset) {
  for_vectors(n, [&](int64_t i, int m) { store_n(out + i, load_n(y + i, m, 0.0f) * factor + offset, m); });
}

template <class T>
void fill_row(T* out, int64_t n, float value) {
  std::fill_n(out, n, from_float<T>(value));
}

// A row that is known: exactly onehot(token), or its logarithm.
template <class T>
void store_onehot(T* out, int64_t n, int64_t token, bool log) {
  fill_row(out, n, log ? -kInf : 0.0f);
  out[token] = from_float<T>(log ? 0.0f : 1.0f);
}

// x_t (or log x_t) of one row, straight from the noise: the whole of noise_interpolate and the second half of
// topk_renoise. Float32 rows are built in place, narrower ones in the thread's scratch row.
template <class T>
void noise_interpolate_row(const PhiloxKey& key, int64_t vocab, int64_t token, float t, float c, bool log, T* out) {
  float* y = scratch_row(vocab);
  const double boost = static_cast<double>(t) * c;  // log of the target's factor
  constexpr double kLn2 = 0.69314718055994531;
  if (log) {
    double total = noise_row<true>(key, vocab, 1.0f - t, y);
    const double own = std::exp2(static_cast<double>(y[token]));
    total += own * std::expm1(boost);
    const float own_log = y[token];
    store_row(out, y, vocab, static_cast<float>(kLn2), static_cast<float>(-std::log(total)));
    out[token] = from_float<T>(static_cast<float>(own_log * kLn2 + boost - std::log(total)));
  } else {
    double total = noise_row<false>(key, vocab, 1.0f - t, y);
    const double own = y[token];
    total += own * std::expm1(boost);
    store_row(out, y, vocab, static_cast<float>(1.0 / total), 0.0f);
    out[token] = from_float<T>(static_cast<float>(own * std::exp(boost) / total));
  }
}

// Calls f with a null pointer of the element type.
template <class F>
void for_dtype(int32_t dtype, F&& f) {
  if (dtype == kFloat32)
    f(static_cast<float*>(nullptr));
  else if (dtype == kBFloat16)
    f(static_cast<bf16*>(nullptr));
  else
    f(static_cast<fp16*>(nullptr));
}
template <class P>
using element = std::remove_pointer_t<P>;

}  // namespace klflow::KLFLOW_ISA
