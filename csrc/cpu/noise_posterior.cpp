// The posterior of each token given its own noisy row, straight from the noise: E is made once into the thread's
// scratch row, summed, and read again, block by block, for the evidence, its softmax sum and the `top` largest. Never
// built: x_t, the evidence, q over V.
#include <vector>

#include "dispatch.h"
#include "evidence.h"

namespace klflow::KLFLOW_ISA {

namespace {

// The `top` largest of a row that arrives in blocks of ascending columns, kept in column order: what passes the
// threshold is appended, and a full queue is cut back to the `top` best, ties to the lower column.
class Selection {
 public:
  Selection(int64_t top, int64_t vocab)
      : top_(top),
        room_(std::min(vocab, std::max<int64_t>(4 * top, 2048))),
        z_(room_ + kBlock + kLanes),
        column_(room_ + kBlock + kLanes) {}

  void clear() {
    size_ = 0;
    threshold_ = -kInf;
    filled_ = false;
  }
  void add(const float* z, int64_t start, int64_t n) {
    if (filled_) {
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) {  // mostly nothing is above: test four vectors at once
        const vf a = load(z + i), b = load(z + i + kLanes), c = load(z + i + 2 * kLanes), d = load(z + i + 3 * kLanes);
        if (!any((a > threshold_) | (b > threshold_) | (c > threshold_) | (d > threshold_))) continue;
        for (int j = 0; j < 4; ++j) append(load(z + i + j * kLanes), start + i + j * kLanes);
      }
      for_vectors(n - i, [&](int64_t j, int m) { append(load_n(z + i + j, m, -kInf), start + i + j); });
    } else {  // until `top` are held, everything is a candidate
      for (int64_t i = 0; i < n; ++i) {
        z_[size_ + i] = z[i];
        column_[size_ + i] = static_cast<int32_t>(start + i);
      }
      size_ += n;
    }
    if (size_ >= room_) cut();
  }
  // Ends the row; `top` entries are then held.
  void finish() { cut(); }
  const float* z() const { return z_.data(); }
  const int32_t* column() const { return column_.data(); }

 private:
  void append(vf v, int64_t start) {
    const vi above = v > threshold_;
    for (int lane = 0; lane < kLanes; ++lane) {
      z_[size_] = v[lane];
      column_[size_] = static_cast<int32_t>(start + lane);
      size_ -= above[lane];
    }
  }
  void cut() {
    if (size_ <= top_) return;
    std::vector<float> sorted(z_.begin(), z_.begin() + size_);
    std::nth_element(sorted.begin(), sorted.begin() + top_ - 1, sorted.end(), std::greater<float>());
    threshold_ = sorted[top_ - 1];
    int64_t ties = top_;
    for (int64_t i = 0; i < size_; ++i) ties -= z_[i] > threshold_;
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (!(z_[i] > threshold_ || (z_[i] == threshold_ && ties-- > 0))) continue;
      z_[kept] = z_[i];
      column_[kept++] = column_[i];
    }
    size_ = kept;
    filled_ = true;
  }

  int64_t top_, room_, size_ = 0;
  float threshold_ = -kInf;
  bool filled_ = false;
  std::vector<float> z_;
  std::vector<int32_t> column_;
};

// E of a whole row and their sum.
double exponential_row(const PhiloxKey& key, int64_t vocab, float* e) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = std::min(vocab, begin + kBlock);
    for (int64_t column = begin; column < end; column += kNoiseColumns) {
      vf v[2 * kChains];
      exponentials(key, column, v);
      for (int i = 0; i < 2 * kChains; ++i) store(e + column + i * kLanes, v[i]);
    }
    vf sum = {};
    for_vectors(end - begin, [&](int64_t i, int m) { sum += load_n(e + begin + i, m, 0.0f); });
    total += static_cast<double>(sum_lanes(sum));
  }
  return total;
}

void store_certain(const NoisePosteriorParams& p, int64_t row, int64_t token) {
  int32_t* ids = p.ids + row * p.top;
  float* q = p.q + row * p.top;
  for (int64_t i = 0; i < p.top; ++i) {
    ids[i] = static_cast<int32_t>(i);
    q[i] = 0.0f;
  }
  if (p.top > 0) {
    const int64_t place = std::min(token, p.top - 1);
    ids[place] = static_cast<int32_t>(token);
    q[place] = 1.0f;
  }
  p.rest[row] = p.top > 0 ? 0.0f : 1.0f;
  if (p.stats == nullptr) return;
  p.stats[3 * row] = p.stats[3 * row + 1] = 0.0f;
  p.stats[3 * row + 2] = 1.0f;
}

}  // namespace

void noise_posterior(const NoisePosteriorParams& p, int64_t begin, int64_t end) {
  Selection selection(p.top, p.vocab);
  float z[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = token_at(p.target, row);
    const Pull pull(p.t.data[row * p.t.stride], p.c);
    if (pull.certain || (p.given.flags != nullptr && p.given.flags[row * p.given.stride])) {
      store_certain(p, row, token);
      continue;
    }
    float* e = scratch_row(p.vocab);
    double noise = exponential_row(philox_key(p.rng, row, kSimplexNoise), p.vocab, e);
    double sum = noise + std::expm1(pull.s) * e[token];
    Evidence evidence(pull.s, sum, p.vocab);
    if (evidence.needs_log1p) {  // 1 - w may be small: it needs an exact sum
      noise = 0.0;
      for (int64_t i = 0; i < p.vocab; ++i) noise += e[i];
      sum = noise + std::expm1(pull.s) * e[token];
      evidence = Evidence(pull.s, sum, p.vocab);
    }
    const float own = p.log_prior[token] + own_evidence(pull.s, e[token], noise, p.vocab);
    float shift = own;
    double total = 0.0;
    selection.clear();
    for (int64_t start = 0; start < p.vocab; start += kBlock) {
      const int64_t n = std::min(kBlock, p.vocab - start);
      evidence_block(evidence, e + start, p.log_prior + start, n, z);
      if (token >= start && token < start + n) z[token - start] = own;
      vf best = splat(-kInf);
      for_vectors(n, [&](int64_t i, int m) { best = maximum(load_n(z + i, m, -kInf), best); });
      const float top = max_lanes(best);
      if (top > shift) {
        total *= std::exp(static_cast<double>(shift) - top);
        shift = top;
      }
      if (shift > -kInf) {
        vf mass = {};
        for_vectors(n, [&](int64_t i, int m) { mass += expv(load_n(z + i, m, -kInf) - shift); });
        total += static_cast<double>(sum_lanes(mass));
      }
      if (p.top > 0) selection.add(z, start, n);
    }
    double kept = 0.0;
    if (p.top > 0) {
      selection.finish();
      std::copy_n(selection.column(), p.top, p.ids + row * p.top);
      const float scale = static_cast<float>(1.0 / total);
      float* q = p.q + row * p.top;
      for_vectors(p.top, [&](int64_t i, int m) {
        const vf mass = expv(load_n(selection.z() + i, m, -kInf) - shift);
        kept += static_cast<double>(sum_lanes(mass));
        store_n(q + i, mass * scale, m);
      });
    }
    p.rest[row] = p.top == p.vocab ? 0.0f : static_cast<float>(std::max(0.0, total - kept) / total);
    if (p.stats != nullptr) {
      p.stats[3 * row] = static_cast<float>(noise * kLn2);
      p.stats[3 * row + 1] = shift;
      p.stats[3 * row + 2] = static_cast<float>(total);
    }
  }
}

}  // namespace klflow::KLFLOW_ISA
