// Rows that are written while the next one is made: the final scaled store, noisy rows, and calls by dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>

#include "noise.h"
#include "sum.h"

namespace klflow::KLFLOW_ISA {

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
