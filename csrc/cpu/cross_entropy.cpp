// Fused log-softmax cross-entropy over one row at a time: loss and lse from one streaming read, which keeps the
// exponentials in the cache where a gradient is wanted; the gradient is then one multiplication of each.
// Never built: log-probabilities, one-hot rows.
//   loss = row_weight (sum_j q_j w_j (lse - z_j) + z_loss lse^2),
//   dloss/dz_j = row_weight ((Q + 2 z_loss lse) p_j - q_j w_j)
// with z = softcap tanh(logits / softcap), Q = sum_j q_j w_j. See CrossEntropyParams. Every z is read relative to the
// sum's shift, and what belongs to the whole row is added up in double: a common offset of the logits changes nothing.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

struct Tanh {
  vf value, slope;  // tanh x and its derivative, neither with cancellation where it is small
};
KLFLOW_INLINE Tanh tanhv(vf x) {
  x = maximum(splat(-43.0f), x);  // further out the derivative is below the smallest float32; NaN stays
  x = minimum(splat(43.0f), x);
  const vf e = expv(x + x), d = 2.0f / (e + 1.0f), x2 = x * x;
  vf p = splat(-0.00627423963f);  // minimax for |x| <= 0.55: relative error 1e-9
  p = p * x2 + 0.0210716799f;
  p = p * x2 - 0.0538523085f;
  p = p * x2 + 0.133325860f;
  p = p * x2 - 0.333333164f;
  const vf near = x * x2 * p + x;
  const vi is_near = x2 < 0.3025f;
  return {is_near ? near : 1.0f - d, is_near ? 1.0f - near * near : d * e * d};
}

// What q is: the target alone, the target and a uniform share, or a row of soft targets.
enum class Target { kHard, kSmoothed, kSoft };

template <class T, class S, Target kTarget>
class RowLoss {
 public:
  explicit RowLoss(const CrossEntropyParams& p) : p_(p), uniform_(p.label_smoothing / static_cast<float>(p.vocab)) {}

  void run(int64_t row) {
    const int64_t token = kTarget == Target::kSoft ? -1 : p_.target.at(row);
    const bool ignored = kTarget != Target::kSoft && token == p_.ignore_index;
    const float dlse = p_.dlse.at(row);
    const bool wanted = p_.dloss.data != nullptr, zero = ignored && dlse == 0.0f, keep = wanted && !zero;
    if (p_.loss == nullptr && !keep) return fill_row(row_of<T>(p_.grad, row), p_.vocab, 0.0f);

    const T* logits = row_of<T>(p_.logits, row);
    const S* soft = kTarget == Target::kSoft ? row_of<S>(p_.soft, row) : nullptr;
    const bool dense = kTarget != Target::kHard && !ignored;
    float *kept = keep ? scratch_row(p_.vocab) : nullptr, *shifts = keep ? scratch_row(p_.vocab, 1) : nullptr;
    float* slopes = keep && p_.softcap > 0.0f ? scratch_row(p_.vocab, 2) : nullptr;
    StreamingSum sum;
    double qw = 0.0, qwz = 0.0;  // sums over the row of q w and q w z, without the hard target's own term
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      const int64_t n = std::min(kBlock, p_.vocab - start);
      const float* z = nullptr;
      if (dense || p_.softcap > 0.0f) z = z_block(logits + start, n, slopes == nullptr ? nullptr : slopes + start);
      float* kept_block = keep ? kept + start : nullptr;
      if (z != nullptr)
        sum.add(z, n, kept_block);
      else
        sum.add(logits + start, n, kept_block);
      if (dense) add_dense(soft, z, start, n, sum.shift(), qw, qwz);
      if (keep) shifts[start / kBlock] = sum.shift();
    }

    const double lse = sum.lse();
    const float row_weight = p_.row_weight.at(row, 1.0f);
    const float own_weight =
        kTarget == Target::kSoft || ignored ? 0.0f : (1.0f - p_.label_smoothing) * class_weight(token);
    if (p_.loss != nullptr) {
      double loss = ignored ? 0.0 : qw * lse - qwz + p_.z_loss * lse * lse;
      if (own_weight != 0.0f) loss += own_weight * (lse - z_at(logits[token]));  // a class of weight 0 may be masked
      p_.loss[row] = static_cast<float>(loss * row_weight);
      p_.lse[row] = static_cast<float>(lse);
    }
    if (!wanted) return;
    if (!keep) return fill_row(row_of<T>(p_.grad, row), p_.vocab, 0.0f);

    // grad_j = (a p_j - scale q_j w_j) dz_j / dlogits_j, p_j = kept_j factor(shift of its block).
    const float scale = ignored ? 0.0f : p_.dloss.at(row) * row_weight;
    const float a = scale * static_cast<float>(qw + own_weight + (ignored ? 0.0 : 2.0 * p_.z_loss * lse)) + dlse;
    T* grad = row_of<T>(p_.grad, row);
    for (int64_t start = 0; start < p_.vocab; start += kBlock) {
      const float factor = a * sum.factor(shifts[start / kBlock]);
      auto gradient = [&](int64_t i, int m) {
        vf g = load_n(kept + i, m, 0.0f) * factor;
        if (dense) g -= dense_qw(soft, i, m) * scale;
        return slopes == nullptr ? g : g * load_n(slopes + i, m, 0.0f);
      };
      const int64_t end = std::min(p_.vocab, start + kBlock);
      write_span(grad, start, end, false, false, gradient);
      if (own_weight == 0.0f || token < start || token >= end) continue;
      const float slope = slopes == nullptr ? 1.0f : slopes[token];
      grad[token] = from_float<T>(gradient(token, 1)[0] - scale * own_weight * slope);
    }
  }

 private:
  float class_weight(int64_t token) const { return p_.weight != nullptr ? p_.weight[token] : 1.0f; }

  float z_at(const T& logit) const {
    const vf x = load_tail(&logit, 1, 0.0f);
    return p_.softcap > 0.0f ? tanhv(x * (1.0f / p_.softcap)).value[0] * p_.softcap : x[0];
  }

  // z of n columns: the logits, or their conversion in buffer_. slopes, if not null, takes dz / dlogits.
  const float* z_block(const T* logits, int64_t n, float* slopes) {
    const float* x = block_of(logits, 0, n, buffer_);
    if (p_.softcap <= 0.0f) return x;
    const float inverse = 1.0f / p_.softcap;
    for_vectors(n, [&](int64_t i, int m) {
      const Tanh tanh = tanhv(load_n(x + i, m, 0.0f) * inverse);
      store(buffer_ + i, tanh.value * p_.softcap);
      if (slopes != nullptr) store_n(slopes + i, tanh.slope, m);
    });
    return buffer_;
  }

  // q_j w_j of a block of columns, the hard target's own term left out.
  KLFLOW_INLINE vf dense_qw(const S* soft, int64_t column, int m) const {
    vf q = splat(uniform_);
    if (kTarget == Target::kSoft) q += load_n(soft + column, m, 0.0f) * (1.0f - p_.label_smoothing);
    return p_.weight != nullptr ? q * load_n(p_.weight + column, m, 0.0f) : q;
  }
  void add_dense(const S* soft, const float* z, int64_t start, int64_t n, float shift, double& qw, double& qwz) const {
    const float zero = shift == -kInf ? 0.0f : shift;  // from where z is counted
    vf weights[4] = {}, products[4] = {};
    auto add = [&](int64_t i, int m, int chain) {
      vf weight = dense_qw(soft, start + i, m);
      for (int lane = m; lane < kLanes; ++lane) weight[lane] = 0.0f;
      vf product = weight * (load_n(z + i, m, 0.0f) - zero);
      // A masked class (z = -infinity) of weight 0 counts for nothing; a soft target of 0 gives NaN there, as in torch.
      if (kTarget == Target::kSmoothed) product = weight == 0.0f ? vf{} : product;
      weights[chain] += weight;
      products[chain] += product;
    };
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int chain = 0; chain < 4; ++chain) add(i + chain * kLanes, kLanes, chain);
    }
    for_vectors(n - i, [&](int64_t k, int m) { add(i + k, m, 0); });
    const double weight = sum_lanes((weights[0] + weights[1]) + (weights[2] + weights[3]));
    qw += weight;
    qwz += sum_lanes((products[0] + products[1]) + (products[2] + products[3])) + weight * zero;
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
