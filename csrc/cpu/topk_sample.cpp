// token ~ softmax(top-k of logits / temperature), restricted to the smallest set of mass >= top_p: a threshold queue
// that reads the row once, then a Gumbel-max draw over the few candidates with the noise contract's accurate small-E
// tail. topk_renoise appends the re-noising of the drawn token. Never built: sorted rows, probabilities, x_0.
#include <vector>

#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

struct Candidate {
  float logit;
  int32_t column;
};
// The order of the queue: larger logits first, ties to the lower column. Unique, so the result is too.
KLFLOW_INLINE bool before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
}

class TopK {
 public:
  TopK(int64_t k, int64_t vocab) : k_(k), room_(std::min(vocab, std::max<int64_t>(4 * k, k + 512))) {
    queue_.resize(room_ + kBlock + kLanes);
  }

  // The k best of the row, unordered; false where the row holds a NaN or nothing finite at the top.
  template <class T>
  bool select(const T* row, int64_t vocab) {
    size_ = 0;
    threshold_ = -kInf;
    filled_ = false;
    float buffer[kBlock + kLanes];
    for (int64_t start = 0; start < vocab; start += kBlock) {
      const int64_t n = std::min(kBlock, vocab - start);
      if (!add_block(block_of(row, start, n, buffer), start, n)) return false;
      if (size_ >= room_) shrink();
    }
    if (size_ > k_) shrink();
    float top = -kInf;
    for (int64_t i = 0; i < size_; ++i) top = std::max(top, queue_[i].logit);
    return top > -kInf && top < kInf;
  }
  Candidate* begin() { return queue_.data(); }
  int64_t size() const { return size_; }

 private:
  bool add_block(const float* z, int64_t start, int64_t n) {
    vi nan = {};
    int64_t size = size_;
    Candidate* queue = queue_.data();
    const float threshold = threshold_;
    const bool all = !filled_;  // until k are held, everything is a candidate
    auto append = [&](int64_t i, int m) {
      const vf v = load_n(z + i, m, -kInf);
      nan |= v != v;
      const vi above = v > threshold;
      if (!all && !any(above)) return;
      for (int lane = 0; lane < m; ++lane) {
        queue[size] = {v[lane], static_cast<int32_t>(start + i + lane)};
        size += all || above[lane] ? 1 : 0;
      }
    };
    if (all) {
      for_vectors(n, append);
    } else {
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) {  // mostly nothing is above: test four vectors at once
        const vf a = load(z + i), b = load(z + i + kLanes), c = load(z + i + 2 * kLanes), d = load(z + i + 3 * kLanes);
        const vi interesting = ~((a <= threshold) & (b <= threshold) & (c <= threshold) & (d <= threshold));
        if (!any(interesting)) continue;  // a NaN is never <=, so it is seen below
        for (int j = 0; j < 4; ++j) append(i + j * kLanes, kLanes);
      }
      if (i < n) for_vectors(n - i, [&](int64_t j, int m) { append(i + j, m); });
    }
    size_ = size;
    return !any(nan);
  }

  void shrink() {
    Candidate* queue = queue_.data();
    if (size_ <= k_) return;
    std::nth_element(queue, queue + k_ - 1, queue + size_, before);
    size_ = k_;
    threshold_ = queue[k_ - 1].logit;  // later columns lose ties, so only larger logits enter from here on
    filled_ = true;
  }

  int64_t k_, room_, size_ = 0;
  float threshold_ = -kInf;
  bool filled_ = false;
  std::vector<Candidate> queue_;
};

class Draw {
 public:
  explicit Draw(const TopkSampleParams& p) : p_(p), top_(p.k, p.vocab) {}

  // The drawn token of a row, -1 where there is none; its log-probability in log_prob.
  template <class T>
  int64_t run(int64_t row, float& log_prob) {
    log_prob = kNaN;
    if (p_.given.flags != nullptr && p_.given.flags[row * p_.given.stride]) {
      log_prob = 0.0f;
      return token_at(p_.given.known, row);
    }
    if (!top_.select(row_of<T>(p_.logits, row), p_.vocab)) return -1;
    Candidate* candidates = top_.begin();
    int64_t n = top_.size();
    if (n == 1) {
      log_prob = 0.0f;
      return candidates[0].column;
    }
    const float inverse = 1.0f / p_.temperature;
    const Candidate best = *std::min_element(candidates, candidates + n, before);
    double total = 0.0;
    auto mass = [&](const Candidate& c) { return std::exp(static_cast<double>(c.logit - best.logit) * inverse); };
    if (p_.top_p < 1.0f) {
      std::sort(candidates, candidates + n, before);
      for (int64_t i = 0; i < n; ++i) total += mass(candidates[i]);
      double kept = 0.0;
      int64_t keep = 0;
      while (keep < n && kept < p_.top_p * total) kept += mass(candidates[keep++]);
      n = std::max<int64_t>(keep, 1);
      total = keep > 0 ? kept : mass(candidates[0]);
    } else {
      std::sort(candidates, candidates + n, [](const Candidate& a, const Candidate& b) { return a.column < b.column; });
      for (int64_t i = 0; i < n; ++i) total += mass(candidates[i]);
    }
    return choose(row, candidates, n, best.logit, inverse, total, log_prob);
  }

 private:
  int64_t choose(int64_t row, const Candidate* candidates, int64_t n, float top, float inverse, double total,
                 float& log_prob) const {
    const PhiloxKey key = philox_key(p_.rng, row, kTokenDrawHigh);
    const uint32_t k0 = static_cast<uint32_t>(key.round_keys[0]), k1 = static_cast<uint32_t>(key.round_keys[1]);
    float best_score = -kInf;
    int64_t best = -1;
    float best_logit = 0.0f;
    uint32_t counter = ~0u;
    Words4 high{}, low{};
    for (int64_t i = 0; i < n; ++i) {
      const int32_t column = candidates[i].column;
      if (static_cast<uint32_t>(column) / 4 != counter) {
        counter = static_cast<uint32_t>(column) / 4;
        high = philox(counter, key.row, key.step, kTokenDrawHigh, k0, k1);
        low = philox(counter, key.row, key.step, kTokenDrawLow, k0, k1);
      }
      const float e = token_exponential(high.w[column % 4], low.w[column % 4]);
      const float score = (candidates[i].logit - top) * inverse - std::log(e);
      if (score > best_score || (score == best_score && column < best)) {
        best_score = score;
        best = column;
        best_logit = candidates[i].logit;
      }
    }
    log_prob = static_cast<float>(static_cast<double>(best_logit - top) * inverse - std::log(total));
    return best;
  }

  const TopkSampleParams& p_;
  TopK top_;
};

}  // namespace

void topk_sample(const TopkSampleParams& p, int64_t begin, int64_t end) {
  for_dtype(p.logits.dtype, [&](auto* type) {
    Draw draw(p);
    for (int64_t row = begin; row < end; ++row) {
      float log_prob;
      p.token[row] = draw.run<element<decltype(type)>>(row, log_prob);
      if (p.log_prob != nullptr) p.log_prob[row] = log_prob;
    }
  });
}

void topk_renoise(const TopkRenoiseParams& p, int64_t begin, int64_t end) {
  const TopkSampleParams& s = p.sample;
  for_dtype(s.logits.dtype, [&](auto* in_type) {
    for_dtype(p.out.dtype, [&](auto* out_type) {
      using Out = element<decltype(out_type)>;
      Draw draw(s);
      NoiseRows<Out> noise(s.rows, s.vocab, p.c, false);
      for (int64_t row = begin; row < end; ++row) {
        float log_prob;
        const int64_t token = draw.run<element<decltype(in_type)>>(row, log_prob);
        s.token[row] = token;
        if (s.log_prob != nullptr) s.log_prob[row] = log_prob;
        Out* out = row_of<Out>(p.out, row);
        if (token < 0)
          fill_row(out, s.vocab, kNaN);
        else if (s.given.flags != nullptr && s.given.flags[row * s.given.stride])
          store_onehot(out, s.vocab, token, false);
        else
          noise.add(philox_key(s.rng, row, kSimplexNoise), token, p.t_next.data[row * p.t_next.stride], out);
      }
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
