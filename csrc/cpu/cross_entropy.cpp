// Fused log-softmax cross-entropy over one row at a time: loss and lse from one streaming read, the gradient from a
// second read that hits the cache (the row was just there). Never built: log-probabilities, one-hot rows.
//   loss = row_weight (sum_j q_j w_j (lse - z_j) + z_loss lse^2),  dloss/dz_j = row_weight ((Q + 2 z_loss lse) p_j -
//   q_j w_j)
// with z = softcap tanh(logits / softcap), Q = sum_j q_j w_j. See CrossEntropyParams.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

struct Tanh {
  vf value, slope;  // tanh x and its derivative, both without cancellation where they are small
};
KLFLOW_INLINE Tanh tanhv(vf x) {
  x = maximum(splat(-20.0f), x);  // further out it is 1 to the last place; NaN stays
  x = minimum(splat(20.0f), x);
  const vf e = expv(x + x), d = 2.0f / (e + 1.0f);
  return {1.0f - d, d * d * e};
}

// What q is: the target alone, the target and a uniform share, or a row of soft targets.
enum class Target { kHard, kSmoothed, kSoft };

struct DenseSums {  // sums over the row of q w and q w z, without the hard target's own term
  double qw = 0.0, qwz = 0.0;
};

template <class T, class S, Target kTarget>
class RowLoss {
 public:
  explicit RowLoss(const CrossEntropyParams& p) : p_(p), uniform_(p.label_smoothing / static_cast<float>(p.vocab)) {}

  void run(int64_t row) {
    const int64_t token = kTarget == Target::kSoft ? -1 : token_at(p_.target, row);
    if (kTarget != Target::kSoft && token == p_.ignore_index) return ignore(row);
    const T* logits = row_of<T>(p_.logits, row);
    const S* soft = kTarget == Target::kSoft ? row_of<S>(p_.soft, row) : nullptr;
    const float row_weight = p_.row_weight.data != nullptr ? p_.row_weight.data[row * p_.row_weight.stride] : 1.0f;
    const float hard = kTarget == Target::kSoft ? 0.0f : (1.0f - p_.label_smoothing) * class_weight(token);

    DenseSums sums;
    float lse;
    if (p_.loss != nullptr) {
      // The gradient of the plain loss is the exponentials of the sum once more: they are kept.
      const bool plain = kTarget == Target::kHard && p_.softcap <= 0.0f, keep = plain && p_.dloss.data != nullptr;
      float *kept = keep ? scratch_row(p_.vocab) : nullptr, *shifts = keep ? scratch_row(p_.vocab, 1) : nullptr;
      StreamingSum z_sum;
      for (int64_t start = 0; start < p_.vocab; start += kBlock) {
        const int64_t n = std::min(kBlock, p_.vocab - start);
        if (plain) {
          z_sum.add(logits + start, n, 1.0f, keep ? kept + start : nullptr);
        } else {
          const float* z = z_block(logits, start, n);
          z_sum.add(z, n, 1.0f);
          if (kTarget != Target::kHard) add_dense(soft, z, start, n, true, sums);
        }
        if (keep) shifts[start / kBlock] = z_sum.shift();
      }
      lse = z_sum.lse();
      double loss = sums.qw * lse - sums.qwz + static_cast<double>(p_.z_loss) * lse * lse;
      if (kTarget != Target::kSoft) loss += hard * (static_cast<double>(lse) - z_at(logits, token));
      p_.loss[row] = static_cast<float>(loss * row_weight);
      p_.lse[row] = lse;
      if (p_.dloss.data == nullptr) return;
      if (keep) return write_kept_gradient(row, token, row_weight, hard, z_sum, kept, shifts);
    } else {
      lse = p_.lse[row];
      if (kTarget != Target::kHard)
        for (int64_t start = 0; start < p_.vocab; start += kBlock)
          add_dense(soft, nullptr, start, std::min(kBlock, p_.vocab - start), false, sums);
    }
    write_gradient(row, logits, soft, token, lse, row_weight, hard, sums.qw);
  }

 private:
  float class_weight(int64_t token) const { return p_.weight != nullptr ? p_.weight[token] : 1.0f; }

  void ignore(int64_t row) {
    if (p_.loss != nullptr) {  // lse stays defined: its gradient may be asked for
      const T* logits = row_of<T>(p_.logits, row);
      StreamingSum z_sum;
      for (int64_t start = 0; start < p_.vocab; start += kBlock) {
        const int64_t n = std::min(kBlock, p_.vocab - start);
        z_sum.add(z_block(logits, start, n), n, 1.0f);
      }
      p_.loss[row] = 0.0f;
      p_.lse[row] = z_sum.lse();
    }
    if (p_.dloss.data == nullptr) return;
    const float dlse = p_.dlse.data != nullptr ? p_.dlse.data[row * p_.dlse.stride] : 0.0f;
    if (dlse == 0.0f)
      fill_row(row_of<T>(p_.grad, row), p_.vocab, 0.0f);
    else
      gradient_pass<false>(row, row_of<T>(p_.logits, row), nullptr, p_.lse[row], dlse, 0.0f);
  }

  float capped(float x) const { return p_.softcap > 0.0f ? p_.softcap * std::tanh(x / p_.softcap) : x; }
  float z_at(const T* logits, int64_t token) const { return capped(load_tail(logits + token, 1, 0.0f)[0]); }

  const float* z_block(const T* logits, int64_t start, int64_t n) {
    const float* x = block_of(logits, start, n, buffer_);
    if (p_.softcap <= 0.0f) return x;
    const float inverse = 1.0f / p_.softcap;
    for_vectors(
        n, [&](int64_t i, int m) { store(buffer_ + i, tanhv(load_n(x + i, m, 0.0f) * inverse).value * p_.softcap); });
    return buffer_;
  }

  // q_j w_j of a block of columns, the hard target's own term left out.
  KLFLOW_INLINE vf dense_qw(const S* soft, int64_t column, int m) const {
    vf q = splat(uniform_);
    if (kTarget == Target::kSoft) q += load_n(soft + column, m, 0.0f) * (1.0f - p_.label_smoothing);
    return p_.weight != nullptr ? q * load_n(p_.weight + column, m, 0.0f) : q;
  }
  void add_dense(const S* soft, const float* z, int64_t start, int64_t n, bool with_z, DenseSums& sums) const {
    vf qw = {}, qwz = {};
    for_vectors(n, [&](int64_t i, int m) {
      vf weights = dense_qw(soft, start + i, m);
      for (int lane = m; lane < kLanes; ++lane) weights[lane] = 0.0f;
      qw += weights;
      if (with_z) qwz += weights * load_n(z + i, m, 0.0f);
    });
    sums.qw += sum_lanes(qw);
    sums.qwz += sum_lanes(qwz);
  }

  void write_gradient(int64_t row, const T* logits, const S* soft, int64_t token, float lse, float row_weight,
                      float hard, double dense_total) {
    const float scale = p_.dloss.data[row * p_.dloss.stride] * row_weight;
    const float dlse = p_.dlse.data != nullptr ? p_.dlse.data[row * p_.dlse.stride] : 0.0f;
    const float a = scale * static_cast<float>(dense_total + hard + 2.0 * p_.z_loss * lse) + dlse;
    // The target's own element, from the logit before an in-place gradient overwrites it.
    float own = 0.0f;
    if (kTarget != Target::kSoft) {
      const float z = z_at(logits, token);
      own = a * std::exp(z - lse) - scale * (hard + uniform_ * class_weight(token));
      if (p_.softcap > 0.0f) own *= 1.0f - (z / p_.softcap) * (z / p_.softcap);
    }
    gradient_pass<kTarget != Target::kHard>(row, logits, soft, lse, a, scale);
    if (kTarget != Target::kSoft) row_of<T>(p_.grad, row)[token] = from_float<T>(own);
  }

  // grad_j = scale ((hard + 2 z_loss lse) p_j - hard [j = k]), p_j = kept_j factor(shift of its block).
  void write_kept_gradient(int64_t row, int64_t token, float row_weight, float hard, const StreamingSum& z_sum,
                           const float* kept, const float* shifts) {
    const float scale = p_.dloss.data[row * p_.dloss.stride] * row_weight;
    const float a = scale * (hard + 2.0f * p_.z_loss * z_sum.lse());
    T* grad = row_of<T>(p_.grad, row);
    float own = 0.0f;
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      const int64_t end = std::min(p_.vocab, start + kBlock);
      const float factor = a * z_sum.factor(shifts[start / kBlock]);
      if (token >= start && token < end) own = kept[token] * factor - scale * hard;
      write_span(grad, start, end, false, false, [&](int64_t i, int m) { return load_n(kept + i, m, 0.0f) * factor; });
    }
    grad[token] = from_float<T>(own);
  }

  // grad_j = (a p_j - scale q_j w_j) dz_j / dlogits_j for the whole row.
  template <bool kDense>
  void gradient_pass(int64_t row, const T* logits, const S* soft, float lse, float a, float scale) {
    T* grad = row_of<T>(p_.grad, row);
    const float inverse = p_.softcap > 0.0f ? 1.0f / p_.softcap : 0.0f;
    for_vectors(p_.vocab, [&](int64_t i, int m) {
      vf x = load_n(logits + i, m, 0.0f), slope = splat(1.0f);
      if (inverse > 0.0f) {
        const Tanh tanh = tanhv(x * inverse);
        x = tanh.value * p_.softcap;
        slope = tanh.slope;
      }
      vf g = expv(x - lse) * a;
      if constexpr (kDense) g -= dense_qw(soft, i, m) * scale;
      store_n(grad + i, g * slope, m);
    });
  }

  const CrossEntropyParams& p_;
  const float uniform_;
  float buffer_[kBlock + kLanes];
};

}  // namespace

void cross_entropy(const CrossEntropyParams& p, int64_t begin, int64_t end) {
  for_dtype(p.logits.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    auto rows = [&](auto&& loss) {
      for (int64_t row = begin; row < end; ++row) loss.run(row);
    };
    if (p.target.data == nullptr)
      for_dtype(p.soft.dtype, [&](auto* soft) { rows(RowLoss<T, element<decltype(soft)>, Target::kSoft>(p)); });
    else if (p.label_smoothing > 0.0f)
      rows(RowLoss<T, float, Target::kSmoothed>(p));
    else
      rows(RowLoss<T, float, Target::kHard>(p));
  });
}

}  // namespace klflow::KLFLOW_ISA
