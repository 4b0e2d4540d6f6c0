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

// Calls f(offset, kLanes) on whole vectors, then f(offset, n) on the n columns that are left.
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

// sum_j exp(scale z_j) = total * exp(scale * shift) over the blocks seen so far. The shift is some z, subtracted before
// anything is multiplied: a common offset, and masks of any size, leave the differences as they are. It is not the
// exact maximum: it only has to stay within a safe distance of it, so one pass per block is enough except when a block
// raises the maximum by a lot.
class StreamingSum {
 public:
  explicit StreamingSum(float scale = 1.0f) : scale_(scale), units_(scale * kLog2E) {}

  // kept, if not null, takes exp(scale * (z - shift())) of the block, which factor(shift()) turns into exp(scale * z -
  // lse). It is written before z has been read for the last time, so it must be other memory.
  template <class T>
  void add(const T* z, int64_t n, float* kept = nullptr) {
    if (shift_ == -kInf) {
      shift_ = block_max(z, n);
      if (shift_ == -kInf) {  // nothing above -infinity yet, or only NaN
        for_vectors(n, [&](int64_t i, int m) {
          const vf v = load_n(z + i, m, -kInf);
          const vf e = v == v ? vf{} : splat(kNaN);
          total_ += sum_lanes(e);
          if (kept != nullptr) store_n(kept + i, e, m);
        });
        return;
      }
    }
    float top;
    double sum = block_sum(z, n, kept, top);
    if ((top - shift_) * units_ > 57.0f) {
      total_ *= distance(shift_, top);
      shift_ = top;
      sum = block_sum(z, n, kept, top);
    }
    total_ += sum;
  }
  float shift() const { return shift_; }                 // of the block that was added last; -infinity: nothing there
  double log_total() const { return std::log(total_); }  // lse - scale * shift()
  double lse() const { return total_ == 0.0 ? -kInf : static_cast<double>(scale_) * shift_ + log_total(); }
  float factor(float shift) const {  // exp(scale * shift - lse), of a block that had this shift; NaN for an empty row
    if (total_ == 0.0) return kNaN;
    return shift == -kInf ? 1.0f : static_cast<float>(distance(shift, shift_) / total_);  // a block of 0 and NaN alone
  }

 private:
  double distance(float from, float to) const {  // exp(scale * (from - to))
    return std::exp(scale_ * (static_cast<double>(from) - to));
  }
  template <class T>
  static float block_max(const T* z, int64_t n) {
    vf top = splat(-kInf);
    for_vectors(n, [&](int64_t i, int m) { top = maximum(load_n(z + i, m, -kInf), top); });
    return max_lanes(top);
  }
  template <class T>
  double block_sum(const T* z, int64_t n, float* kept, float& top) const {
    return kept != nullptr ? block_sum<true, T>(z, n, kept, top) : block_sum<false, T>(z, n, kept, top);
  }
  template <bool kKeep, class T>
  double block_sum(const T* z, int64_t n, float* kept, float& top_out) const {
    // Four chains hide the latency of the additions; the split depends on the column alone.
    vf sums[4] = {}, tops[4] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf v = load(z + i + j * kLanes);
        tops[j] = maximum(v, tops[j]);
        const vf e = exp2v((v - shift_) * units_);
        if constexpr (kKeep) store(kept + i + j * kLanes, e);
        sums[j] += e;
      }
    }
    for_vectors(n - i, [&](int64_t k, int m) {
      const vf v = load_n(z + i + k, m, -kInf);
      tops[0] = maximum(v, tops[0]);
      const vf e = exp2v((v - shift_) * units_);  // 0 in the lanes past the end
      if constexpr (kKeep) store_n(kept + i + k, e, m);
      sums[0] += e;
    });
    top_out = max_lanes(maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3])));
    return static_cast<double>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }

  const float scale_, units_;
  float shift_ = -kInf;
  double total_ = 0.0;
};

// E of columns [column, column + kNoiseColumns), column a multiple of 4, in units of ln 2: in [8.6e-8, 33].
template <bool kShort = false>
KLFLOW_INLINE void exponentials(const PhiloxKey& key, int64_t column, vf (&e)[2 * kChains]) {
  vu words[2 * kChains];
  philox_words(key, column, words);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    vf* v = e + half * kChains;
    each_chain([&](int i) { v[i] = simplex_uniformv(words[half * kChains + i]); });
    log2_chains<kShort>(v);
    each_chain([&](int i) { v[i] = -v[i]; });
  }
}

// Fills y with columns [first, first + n) of the unnormalised noisy row E_j^(1 - t) (or, with kLog, with (1 - t) log2
// E_j) and returns the sum of E_j^(1 - t). E is in units of ln 2, a factor that the normalisation removes; first is a
// multiple of 4; y has room for kNoiseColumns more. meanwhile(n) is called for every n columns made: what can be done
// beside the arithmetic. kShort: y is for 16-bit results.
template <bool kLog, bool kShort, class F>
double noise_row(const PhiloxKey& key, int64_t first, int64_t n, float one_minus_t, float* y, F&& meanwhile) {
  double total = 0.0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    vf sums[kChains] = {};
    for (int64_t column = begin; column < end; column += kNoiseColumns) {
      meanwhile(kNoiseColumns);
      vf powers[2 * kChains];
      exponentials<kShort>(key, first + column, powers);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        vf* v = powers + half * kChains;
        log2_absolute_chains<kShort>(v);
        each_chain([&](int i) { v[i] *= one_minus_t; });
        float* out = y + column + half * kChains * kLanes;
        if constexpr (kLog) each_chain([&](int i) { store(out + i * kLanes, v[i]); });
        exp2_chains<kShort>(v);
        if constexpr (!kLog) each_chain([&](int i) { store(out + i * kLanes, v[i]); });
      }
      const int64_t left = end - column;
      if (left < kNoiseColumns) {  // the columns past the end do not count
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
  const Rng::State state = rng.at(row);
  return {static_cast<uint32_t>(state.seed) | static_cast<uint64_t>(key_of_row(state.seed, state.row)) << 32,
          static_cast<uint32_t>(state.row), static_cast<uint32_t>(state.step), stream};
}

template <class T>
T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// Scratch rows of this thread, kept between calls (fresh ones would cost page faults): row `index` of rows this long.
inline float* scratch_row(int64_t columns, int index = 0) {
  thread_local std::unique_ptr<float[]> buffers[4];
  thread_local int64_t sizes[4] = {};
  const int64_t wanted = columns + 2 * kNoiseColumns;
  if (sizes[index] < wanted) {
    buffers[index].reset(new float[wanted]);
    sizes[index] = wanted;
  }
  return buffers[index].get();
}

template <class T>
KLFLOW_INLINE T from_float(float x) {
  T lanes[kLanes];
  store(lanes, splat(x));
  return lanes[0];
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

// Results of this size are streamed past the caches: whoever reads them next will not find them there anyway.
constexpr int64_t kStreamBytes = 16 << 20;
template <class T>
bool is_streamed(int64_t rows, int64_t vocab) {
  return rows * vocab * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// out[i] = value(i) for i in [begin, end), in whole aligned vectors between a head and a tail. value(i, m) gives the
// vector at column i, of which m lanes count. end_open: leave what does not fill a vector; returns how far it came.
template <class T, class F>
KLFLOW_INLINE int64_t write_span(T* out, int64_t begin, int64_t end, bool streamed, bool end_open, F&& value) {
  constexpr int kStep = kPacked<T> * kLanes;
  auto narrow = [&](int64_t from, int64_t to) {
    for_vectors(to - from, [&](int64_t i, int m) { store_n(out + from + i, value(from + i, m), m); });
  };
  const int64_t misfit = (-reinterpret_cast<intptr_t>(out + begin) & (4 * kLanes - 1)) / sizeof(T);
  int64_t i = std::min(end, begin + misfit);
  if (i > begin) narrow(begin, i);
  for (; i + kStep <= end; i += kStep) {
    vf v[kPacked<T>];
    for (int j = 0; j < kPacked<T>; ++j) v[j] = value(i + j * kLanes, kLanes);
    const vu packed = pack(out, v);
    if (streamed)
      stream(out + i, packed);
    else
      std::memcpy(out + i, &packed, sizeof(packed));
  }
  if (end_open || i == end) return i;
  narrow(i, end);
  return end;
}

// A row on its way to memory: out = y * factor + offset, but `own` at `token`. It is written a part at a time, so that
// the stores go on beside the arithmetic of the next row.
template <class T>
class PendingRow {
 public:
  void start(T* out, const float* y, int64_t n, float factor, float offset, int64_t token, float own, bool streamed) {
    out_ = out, y_ = y, n_ = n, factor_ = factor, offset_ = offset, token_ = token, own_ = own, streamed_ = streamed;
    at_ = goal_ = 0;
  }
  KLFLOW_INLINE void advance(int64_t columns) {
    goal_ = std::min(n_, goal_ + columns);
    at_ = write(goal_, true);
  }
  void finish() {
    if (out_ == nullptr) return;
    write(n_, false);
    out_[token_] = from_float<T>(own_);
    out_ = nullptr;
    n_ = 0;
  }

 private:
  KLFLOW_INLINE int64_t write(int64_t end, bool end_open) {
    return write_span(out_, at_, end, streamed_, end_open,
                      [&](int64_t i, int m) { return load_n(y_ + i, m, 0.0f) * factor_ + offset_; });
  }
  T* out_ = nullptr;
  const float* y_ = nullptr;
  int64_t n_ = 0, at_ = 0, goal_ = 0, token_ = 0;
  float factor_ = 0.0f, offset_ = 0.0f, own_ = 0.0f;
  bool streamed_ = false;
};

// x_t (or log x_t) of rows, straight from the noise: the whole of noise_interpolate and the second half of
// topk_renoise. A row is written while the next one is made, from the other of two scratch rows.
template <class T>
class NoiseRows {
 public:
  NoiseRows(int64_t rows, int64_t vocab, float c, bool log)
      : vocab_(vocab), c_(c), log_(log), streamed_(is_streamed<T>(rows, vocab)) {}
  ~NoiseRows() {
    pending_.finish();
    if (streamed_) stream_fence();
  }
  NoiseRows(const NoiseRows&) = delete;

  void add(const PhiloxKey& key, int64_t token, float t, T* out) {
    float* y = scratch_row(vocab_, turn_);
    turn_ ^= 1;
    auto write_pending = [&](int64_t columns) { pending_.advance(columns); };
    const double boost = static_cast<double>(t) * c_;  // log of the target's factor
    if (log_) {
      double total = noise_row<true, false>(key, 0, vocab_, 1.0f - t, y, write_pending);
      total += std::exp2(static_cast<double>(y[token])) * std::expm1(boost);
      const double log_total = std::log(total);
      pending_.finish();
      pending_.start(out, y, vocab_, static_cast<float>(kLn2), static_cast<float>(-log_total), token,
                     static_cast<float>(y[token] * kLn2 + boost - log_total), streamed_);
    } else {
      double total = noise_row<false, sizeof(T) == 2>(key, 0, vocab_, 1.0f - t, y, write_pending);
      const double own = y[token];
      total += own * std::expm1(boost);
      pending_.finish();
      pending_.start(out, y, vocab_, static_cast<float>(1.0 / total), 0.0f, token,
                     static_cast<float>(own * std::exp(boost) / total), streamed_);
    }
  }

 private:
  const int64_t vocab_;
  const float c_;
  const bool log_, streamed_;
  int turn_ = 0;
  PendingRow<T> pending_;
};

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
