// Where a row's E comes from (PosteriorParams in common/params.h): the noise and a target, the noise and boosts, or a
// dense state. A source, one for each row, does in this order:
//   start   finds out whether the row has E: it may be onehot(token), or not valid
//   open    makes what all of E needs; false: the row is not valid after all
//   sum     makes E, which then waits in row.kept, and returns the sum of all but the token's, with e^-s of that
//   split   of this sum
#pragma once

#include "selection.cuh"

namespace klflow::cuda {

// Columns are of the slice, which begins at column `begin` of the row; token is a column of the row.
struct PosteriorRow : KeptRow {
  int begin;
  bool narrow;  // E one column at a time, as exactly as float32 allows: see kNarrow
  float t, gain;
  int token;       // whose evidence has no cancellation: the target, the largest boosted or entry; -1: none is large
  int own_column;  // the token's, of the slice; from open on, which saves registers

  __device__ __forceinline__ void set_token(int column) {
    token = column;
    own_column = column - begin;
  }
  // Of the quad at this column.
  __device__ __forceinline__ bool holds_own(int column) const {
    return static_cast<uint32_t>(own_column - column) < kQuad;
  }
  __device__ __forceinline__ bool is_cut(int column) const { return column + kQuad > size; }
};

// Adds this thread's E to the sum, without the token's. make(column, e) makes one column or, of rows that are not
// narrow, a quad.
template <class Make>
__device__ __forceinline__ void add_row(const PosteriorRow& row, double& sum, Make&& make) {
  if (row.narrow) {
    for (int column = thread_of_row(); column < row.size; column += kThreads) {
      float e[kQuad];
      make(column, e);
      if (column != row.own_column) sum += e[0];
    }
  } else {
    float partial = 0.0f;
    for (int column = row.first; column < row.size; column += kStride) {
      float e[kQuad];
      make(column, e);
      if (row.holds_own(column) || row.is_cut(column)) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) e[i] = column + i < row.size && column + i != row.own_column ? e[i] : 0.0f;
      }
      partial += (e[0] + e[1]) + (e[2] + e[3]);
    }
    sum += partial;
  }
}

struct Start {
  bool valid, certain;  // certain: the row is onehot(token)
};

// The noise of a row, and what its token's E is.
struct RowNoise {
  float own, boost;  // the token's noise, and the logarithm of what multiplies it

  __device__ __forceinline__ void open(const PosteriorParams& p, int64_t n) { store_round_keys(noise_key(p.rng, n)); }
  __device__ __forceinline__ float exact(int column) const { return exact_noise(row_noise_words(column), column); }
  // E of the noise into row.kept.
  __device__ __forceinline__ void make(const PosteriorRow& row, int column, float (&e)[kQuad]) const {
    if (row.narrow) {
      e[0] = exact(column);
      row.kept[column] = e[0];
    } else {
      const Words4 words = row_noise_words(row.begin + column);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) e[i] = exponential_noise(words.w[i]);
      store_quad(row.kept + column, e);
    }
  }
  // The same of all of a row that is not narrow; returns this thread's share of the sum.
  __device__ __forceinline__ double make_all(const PosteriorRow& row) const {
    const SharedAddress round_keys = round_keys_of_row();
    float partial = 0.0f;
    const int end = row.size - kQuad + 1;
    int column = row.first;
    for (; column < end; column += 2 * kStride) {  // two quads; where the second is not whole it waits
      const int columns[2] = {row.begin + column, row.begin + column + kStride};
      Words4 words[2];
      row_noise_words(columns, round_keys, words);
      float e[2][kQuad];
#pragma unroll
      for (int i = 0; i < 2 * kQuad; ++i) e[i / kQuad][i % kQuad] = exponential_noise(words[i / kQuad].w[i % kQuad]);
      store_quad(row.kept + column, e[0]);
      partial += (e[0][0] + e[0][1]) + (e[0][2] + e[0][3]);
      if (column + kStride < end) {
        store_quad(row.kept + column + kStride, e[1]);
        partial += (e[1][0] + e[1][1]) + (e[1][2] + e[1][3]);
      }
    }
    const int thread = thread_of_row();
    column = unhoisted(row.size) / kQuad * kQuad + thread;
    if (thread < kQuad && row.size % kQuad != 0) {  // a cut quad
      const int of_row = row.begin + column;
      const float e = column < row.size ? exponential_noise(word_at(row_noise_words(of_row), of_row)) : 0.0f;
      row.kept[column] = e;
      partial += e;
    }
    return partial;
  }
  // What a sum over the row begins with: the token's share, in one thread.
  __device__ __forceinline__ double first_of_sum(const PosteriorRow& row) const {
    return threadIdx.x == 0 && row.begin == 0 ? expf(boost - row.gain) * own : 0.0;
  }
};

__device__ __forceinline__ int target_of(const PosteriorParams& p, int64_t n) {
  const int64_t target = p.target.at(n);
  return target >= 0 && target < p.vocab ? static_cast<int>(target) : -1;
}

struct NoiseSource {
  static constexpr bool kDense = false, kBoosted = false;
  static constexpr bool kLargeW = false;  // in a row that is not narrow

  RowNoise noise;

  __device__ __forceinline__ Start start(const PosteriorParams& p, int64_t n, PosteriorRow& row) {
    row.token = target_of(p, n);
    return {row.token >= 0, p.given.at(n) || !(row.gain <= kMostGain)};
  }
  __device__ __forceinline__ bool open(const PosteriorParams& p, int64_t n, PosteriorRow& row) {
    noise.open(p, n);
    noise.own = noise.exact(row.token);
    noise.boost = row.gain;
    row.set_token(row.token);
    return true;
  }
  __device__ __forceinline__ double sum(const PosteriorParams&, int64_t, PosteriorRow& row) {
    double sum = noise.first_of_sum(row);
    if (row.narrow) {
      add_row(row, sum, [&](int column, float (&e)[kQuad]) { noise.make(row, column, e); });
    } else {
      sum += noise.make_all(row);
      if (threadIdx.x == 0 && row.begin == 0)  // the token's, which is counted with its share
        sum -= exponential_noise(word_at(row_noise_words(row.token), row.token));
    }
    return row_sum(sum);
  }
  __device__ __forceinline__ Split<float> split(double sum, float gain) const {
    return split_of_noise(sum, noise.own, noise.boost, gain);
  }
};

// The largest of the boosted columns; value is +infinity where a slot holds no token or no number.
struct Boosted {
  float value, noise, boost;
  int column;
};
__device__ __forceinline__ Boosted larger(const Boosted& a, const Boosted& b) {
  return a.value > b.value || (a.value == b.value && a.column < b.column) ? a : b;
}
// Calls f(column, E, boost) for this thread's slots of a row; the column is -1 where they hold no token or no number.
template <class F>
__device__ __forceinline__ void each_slot(const PosteriorParams& p, int64_t row, F&& f) {
  for (int slot = thread_of_row(); slot < p.slots; slot += kThreads) {
    const int64_t column = p.target.at(row, slot);
    if (column == -1) continue;
    const float boost = p.boost[row * p.slots + slot];
    if (column < 0 || column >= p.vocab || !(boost == boost))
      f(-1, 0.0f, 0.0f);
    else
      f(static_cast<int>(column), exact_noise(row_noise_words(static_cast<int>(column)), column),
        fminf(fmaxf(boost, -kMostBoost), kMostBoost));
  }
}

struct BoostedSource {
  static constexpr bool kDense = false, kBoosted = true, kLargeW = true;

  RowNoise noise;

  __device__ __forceinline__ Start start(const PosteriorParams& p, int64_t n, PosteriorRow& row) {
    row.token = target_of(p, n);
    const bool certain = p.given.at(n);
    return {!certain || row.token >= 0, certain};
  }
  __device__ __forceinline__ bool open(const PosteriorParams& p, int64_t n, PosteriorRow& row) {
    noise.open(p, n);
    Boosted mine{-infinity(), 0.0f, 0.0f, -1};
    each_slot(p, n, [&](int column, float e, float boost) {
      mine = larger(mine, {column < 0 ? infinity() : e * expf(boost), e, boost, column});
    });
    mine = row_reduce<false>(mine, [](const Boosted& a, const Boosted& b) { return larger(a, b); });
    if (!(mine.value < infinity())) return false;
    row.set_token(mine.column);
    noise.own = mine.noise;
    noise.boost = mine.boost;
    return true;
  }
  // The boosted columns are taken out, the others summed, and what the boosts make of the columns is added: taken from
  // a sum over all columns, the noise of columns with negative boosts would leave nothing but its rounding.
  __device__ __forceinline__ double sum(const PosteriorParams& p, int64_t n, PosteriorRow& row) {
    double sum = noise.first_of_sum(row);
    for (int column = row.narrow ? static_cast<int>(threadIdx.x) : row.first; column < row.size;
         column += row.narrow ? kThreads : kStride) {
      float e[kQuad];
      noise.make(row, column, e);
    }
    auto each_boosted = [&](auto&& f) {  // f(column of the slice, what its boost makes of it), the row's token aside
      each_slot(p, n, [&](int column, float e, float boost) {
        const int in_slice = column - row.begin;
        if (column != row.token && in_slice >= 0 && in_slice < row.size) f(in_slice, e * expf(boost));
      });
    };
    __syncthreads();
    each_boosted([&](int column, float) { row.kept[column] = 0.0f; });
    __syncthreads();
    add_row(row, sum, [&](int column, float (&e)[kQuad]) {
      if (row.narrow)
        e[0] = row.kept[column];
      else
        load_quad(row.kept + column, e);
    });
    __syncthreads();
    each_boosted([&](int column, float raised) {
      row.kept[column] = raised;
      sum += raised;
    });
    sum = row_sum(sum);
    const float own_raised = noise.own * expf(noise.boost);
    if (lift_of(row.gain) * kMostNoise > kSeries * (sum + own_raised)) return sum_of_largest(row, own_raised);
    return sum;
  }
  // The same where some w are large: the largest of all may have no boost, and is the token then.
  __device__ __forceinline__ double sum_of_largest(PosteriorRow& row, float own_raised) {
    if (threadIdx.x == 0 && row.own_column >= 0 && row.own_column < row.size) row.kept[row.own_column] = own_raised;
    __syncthreads();
    Boosted most{-infinity(), 0.0f, 0.0f, -1};
    for (int column = thread_of_row(); column < row.size; column += kThreads)
      most = larger(most, {row.kept[column], row.kept[column], 0.0f, row.begin + column});
    most = row_reduce(most, [](const Boosted& a, const Boosted& b) { return larger(a, b); });
    if (most.value > own_raised || row.token < 0) {
      row.set_token(most.column);
      noise.own = most.noise;
      noise.boost = 0.0f;
    }
    double sum = noise.first_of_sum(row);
    for (int column = thread_of_row(); column < row.size; column += kThreads)
      if (column != row.own_column) sum += row.kept[column];
    return row_sum(sum);
  }
  __device__ __forceinline__ Split<float> split(double sum, float gain) const {
    return split_of_noise(sum, noise.own, noise.boost, gain);
  }
};

// The largest entry of a state, the lowest of equals, and how many are above -infinity; value is +infinity where one is
// no number.
struct Peak {
  float value;
  int column;
  uint32_t entries;
};
__device__ __forceinline__ Peak higher(const Peak& a, const Peak& b) {
  const bool first = a.value > b.value || (a.value == b.value && a.column < b.column);
  return {first ? a.value : b.value, first ? a.column : b.column, a.entries + b.entries};
}

// A state of type T.
template <class T>
struct StateSource {
  static constexpr bool kDense = true, kBoosted = false, kLargeW = true;

  Peak peak;
  float power;

  // Leaves log_x in row.kept.
  __device__ __forceinline__ Start start(const PosteriorParams& p, int64_t n, PosteriorRow& row) {
    peak = {-infinity(), 0, 0};
    const T* log_x = row_of<T>(p.log_x, n) + row.begin;
    for (int column = kVector * thread_of_row(); column < row.size; column += kVector * kThreads) {
      const Vector<T> raw = load_vector<T>(log_x, column, row.size, from_float<T>(-infinity()));
      float v[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        v[i] = to_float(raw.element[i]);
        if (v[i] > peak.value || !(v[i] == v[i])) {
          peak.value = v[i] == v[i] ? v[i] : infinity();
          peak.column = row.begin + column + i;
        }
        peak.entries += v[i] > -infinity();
      }
      store_kept(row.kept, column, v);
    }
    peak = row_reduce(peak, [](const Peak& a, const Peak& b) { return higher(a, b); });
    row.token = peak.column;
    return {peak.value > -infinity() && peak.value < infinity(), row.t == 1.0f || peak.entries == 1};
  }
  __device__ __forceinline__ bool open(const PosteriorParams&, int64_t, PosteriorRow& row) {
    power = 1.4426950408889634f / (1.0f - row.t);
    row.set_token(row.token);
    return true;
  }
  __device__ __forceinline__ double sum(const PosteriorParams&, int64_t, PosteriorRow& row) {
    double sum = 0.0;
    add_row(row, sum, [&](int column, float (&e)[kQuad]) {
      if (row.narrow) {
        e[0] = exp2f((row.kept[column] - peak.value) * power);
        row.kept[column] = e[0];
      } else {
        load_quad(row.kept + column, e);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) e[i] = ex2_approx((e[i] - peak.value) * power);
        store_quad(row.kept + column, e);
      }
    });
    return row_sum(sum);
  }
  // In units of the token's E.
  __device__ __forceinline__ Split<float> split(double sum, float gain) const {
    return {fmaxf(static_cast<float>(sum) + expf(-gain), 1e-37f), lift_of(gain)};  // 1e-37: e_k is then 85 V
  }
};

}  // namespace klflow::cuda
