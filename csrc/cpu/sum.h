// A streaming sum of exponentials, in column order with double block totals: same row, same bits.
#pragma once

#include <cmath>

#include "block.h"
#include "exp2.h"

namespace klflow::KLFLOW_ISA {

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

}  // namespace klflow::KLFLOW_ISA
