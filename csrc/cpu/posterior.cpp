// The posterior of each token given its own noisy row: E is made once into the thread's scratch row, from the noise or
// from a dense state, summed, and read again, block by block, for the evidence, its softmax sum and the `top` largest.
// Never built: x_t, the evidence, q over V.
#include <vector>

#include "dispatch.h"
#include "evidence.h"

namespace klflow::KLFLOW_ISA {

namespace {

KLFLOW_INLINE void store_raw(int32_t* p, vi v) { std::memcpy(p, &v, sizeof(v)); }

// The `top` largest of a row that arrives in blocks of ascending columns, kept in column order: what passes the
// threshold is appended, and a full queue is cut back to the `top` best, ties to the lower column.
class Selection {
 public:
  Selection(int64_t top, int64_t vocab)
      : top_(top),
        room_(std::min(vocab, std::max<int64_t>(4 * top, 2048))),
        z_(room_ + kBlock + kLanes),
        column_(room_ + kBlock + kLanes) {
    for (int i = 0; i < kLanes; ++i) lane_[i] = i;
  }

  void clear() {
    size_ = 0;
    threshold_ = -kInf;
    filled_ = false;
  }
  void add(const float* z, int64_t start, int64_t n) {
    if (filled_) {
      const vf bound = splat(threshold_);
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes) {  // mostly nothing is above: test four vectors at once
        const vi above = (load(z + i) > bound) | (load(z + i + kLanes) > bound) | (load(z + i + 2 * kLanes) > bound) |
                         (load(z + i + 3 * kLanes) > bound);
        if (!any(above)) continue;
        for (int j = 0; j < 4; ++j) {
          const vf v = load(z + i + j * kLanes);
          append(v, lane_ + static_cast<int32_t>(start + i + j * kLanes), v > bound);
        }
      }
      for_vectors(n - i, [&](int64_t j, int m) {
        const vf v = load_n(z + i + j, m, -kInf);
        append(v, lane_ + static_cast<int32_t>(start + i + j), v > bound);
      });
    } else {  // until `top` are held, everything is a candidate
      for_vectors(n, [&](int64_t i, int m) {
        store(z_.data() + size_ + i, load_n(z + i, m, -kInf));
        store_raw(column_.data() + size_ + i, lane_ + static_cast<int32_t>(start + i));
      });
      size_ += n;
    }
    if (size_ >= room_) cut();
  }
  // Ends the row; `top` entries are then held.
  void finish() { cut(); }
  const float* z() const { return z_.data(); }
  const int32_t* column() const { return column_.data(); }

 private:
  // The lanes of v that are taken, in order.
  KLFLOW_INLINE void append(vf v, vi column, vi taken) {
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_movepi32_mask(reinterpret_cast<__m512i>(taken));
    store(z_.data() + size_, reinterpret_cast<vf>(_mm512_maskz_compress_ps(mask, reinterpret_cast<__m512>(v))));
    store_raw(column_.data() + size_,
              reinterpret_cast<vi>(_mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(column))));
    size_ += __builtin_popcount(mask);
#else
    for (int lane = 0; lane < kLanes; ++lane) {
      z_[size_] = v[lane];
      column_[size_] = column[lane];
      size_ -= taken[lane];
    }
#endif
  }

  int64_t count(float bound, int64_t vectors) const {  // of entries >= bound
    vi total = {};
    for (int64_t i = 0; i < vectors; ++i) total -= load(z_.data() + i * kLanes) >= bound;
    int64_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
    return sum;
  }

  // Keeps the `top` best. Their bound is found by bisection over the ordered bit patterns of float32, counting a few
  // thousand entries in each step: 32 steps at most, fewer where a bound with exactly `top` entries is met.
  void cut() {
    if (size_ <= top_) return;
    store(z_.data() + size_, splat(-kInf));
    const int64_t vectors = (size_ + kLanes - 1) / kLanes;
    vf best = splat(-kInf);
    for (int64_t i = 0; i < vectors; ++i) best = maximum(load(z_.data() + i * kLanes), best);
    int64_t low = order_of(threshold_), high = order_of(max_lanes(best)), kept = size_;
    while (low < high) {  // at least `top` entries are >= low, fewer are > high
      const int64_t middle = low + (high - low + 1) / 2;
      const int64_t n = count(from_order(middle), vectors);
      if (n >= top_) low = middle, kept = n;
      if (n == top_) break;
      if (n < top_) high = middle - 1;
    }
    threshold_ = from_order(low);
    const vf bound = splat(threshold_);
    int64_t ties = kept - top_;  // the last of the entries equal to the bound go
    const int64_t size = size_;
    size_ = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
      const vf v = load(z_.data() + i);
      append(v, load_raw<vi>(column_.data() + i), v >= bound);
    }
    if (size_ > kept) size_ = kept;  // lanes past the end
    for (int64_t i = size_ - 1; ties > 0 && i >= 0; --i) {
      if (z_[i] != threshold_) continue;
      std::copy(z_.begin() + i + 1, z_.begin() + size_, z_.begin() + i);
      std::copy(column_.begin() + i + 1, column_.begin() + size_, column_.begin() + i);
      --size_, --ties;
    }
    filled_ = true;
  }

  // Float32 as integers of the same order.
  static int32_t order_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
  }
  static float from_order(int64_t order) {
    int32_t bits = static_cast<int32_t>(order);
    if (bits < 0) bits ^= 0x7fffffff;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }

  int64_t top_, room_, size_ = 0;
  float threshold_ = -kInf;
  bool filled_ = false;
  vi lane_;  // 0, 1, 2, ...
  std::vector<float> z_;
  std::vector<int32_t> column_;
};

// The sum of value(i, m) over n columns, in four chains: float32 sums of few terms.
template <class F>
KLFLOW_INLINE double sum_vectors(int64_t n, F&& value) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += value(i + j * kLanes, kLanes);
  }
  for_vectors(n - i, [&](int64_t k, int m) { sums[0] += value(i + k, m); });
  return static_cast<double>(sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// The sum of a row of E, block by block; before(begin, end) makes a block.
template <class F>
double sum_row(const float* e, int64_t vocab, F&& before) {
  double total = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = std::min(vocab, begin + kBlock);
    before(begin, end);
    total += sum_vectors(end - begin, [&](int64_t i, int m) { return load_n(e + begin + i, m, 0.0f); });
  }
  return total;
}
double exact_sum(const float* e, int64_t vocab) {
  double total = 0.0;
  for (int64_t i = 0; i < vocab; ++i) total += e[i];
  return total;
}

// E of a whole row and their sum.
double exponential_row(const PhiloxKey& key, int64_t vocab, float* e) {
  return sum_row(e, vocab, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; column += kNoiseColumns) {
      vf v[2 * kChains];
      exponentials(key, column, v);
      for (int i = 0; i < 2 * kChains; ++i) store(e + column + i * kLanes, v[i]);
    }
  });
}

// E of a row (up to a factor; that of its column `own` is not used), where it is split, and the largest other E.
struct Row {
  float* e;
  int64_t own;  // the target, the largest boosted column, column or entry; -1: none is large
  Split<double> split;
  float largest = kMostUnits;
  double noise = 0.0;    // the sum of the noise of a target's row
  bool certain = false;  // the row is onehot(own)
};

Row row_of_noise(const PosteriorParams& p, int64_t row, double gain) {
  float* e = scratch_row(p.vocab);
  const int64_t target = p.target.at(row);
  if ((p.boost == nullptr && is_certain(gain)) || p.given.at(row)) {
    return {e, target, {}, 0.0f, 0.0, true};
  }
  double noise = exponential_row(philox_key(p.rng, row, kSimplexNoise), p.vocab, e);
  // 1 - w of any column may be small: the sum must then be exact.
  auto needs_exact = [&](const Split<double>& split) { return Evidence(gain, split.sum(), p.vocab).needs_log1p; };
  if (p.boost == nullptr) {
    if (needs_exact(split_of_noise<double>(noise, e[target], gain, gain))) noise = exact_sum(e, p.vocab);
    if (p.stats != nullptr) noise = noise_of_stats(stats_of_noise(noise));  // as who reads the stats will have it
    return {e, target, split_of_noise<double>(noise, e[target], gain, gain), kMostUnits, noise};
  }
  // The boosted columns are taken out, the others summed, and what the boosts make of the columns is added: taken from
  // a sum over all columns, the noise of columns with negative boosts would leave nothing but its rounding.
  float* raised = scratch_row(p.slots, 1);
  int64_t own = -1, own_slot = -1;
  double own_noise = 0.0, own_boost = 0.0;
  for (int64_t slot = 0; slot < p.slots; ++slot) {
    const int64_t column = p.target.at(row, slot);
    if (column < 0) continue;
    const double boost = std::clamp<double>(p.boost[row * p.slots + slot], -kMostBoost, kMostBoost);
    raised[slot] = static_cast<float>(e[column] * std::exp(boost));
    if (own >= 0 && !(raised[slot] > raised[own_slot])) continue;
    own = column, own_slot = slot, own_noise = e[column], own_boost = boost;
  }
  auto each_other = [&](auto&& f) {
    for (int64_t slot = 0; slot < p.slots; ++slot)
      if (slot != own_slot && p.target.at(row, slot) >= 0) f(e[p.target.at(row, slot)], raised[slot]);
  };
  if (own >= 0) e[own] = 0.0f;
  each_other([](float& noise_of_column, float) { noise_of_column = 0.0f; });
  auto split_of = [&](double unboosted) {
    double base = unboosted + std::exp(own_boost - gain) * own_noise;
    each_other([&](float, float value) { base += value; });
    return split_of_noise<double>(base, own_noise, own_boost, gain);
  };
  Split<double> split = split_of(sum_row(e, p.vocab, [](int64_t, int64_t) {}));
  if (needs_exact(split)) {
    const int64_t column = std::max_element(e, e + p.vocab) - e;
    if (own < 0 || e[column] > raised[own_slot]) {  // the largest of all has no boost
      own = column, own_slot = -1, own_noise = e[column], own_boost = 0.0;
      e[column] = 0.0f;
    }
    split = split_of(exact_sum(e, p.vocab));
  }
  Row result{e, own, split};
  each_other([&](float& noise_of_column, float value) {
    noise_of_column = value;
    result.largest = std::max(result.largest, value);
  });
  return result;
}

// E of a dense state, in units of its largest.
template <class T>
Row row_of_state(const PosteriorParams& p, int64_t row, double gain, float t) {
  float* e = scratch_row(p.vocab);
  const T* log_x = row_of<T>(p.log_x, row);
  vf best = splat(-kInf);
  vi count = {};    // minus the entries above -infinity
  vi strange = {};  // which are no number
  for_vectors(p.vocab, [&](int64_t i, int m) {
    const vf v = load_n(log_x + i, m, -kInf);
    store_n(e + i, v, m);
    best = maximum(v, best);
    count += v > -kInf;
    strange |= v != v;
  });
  const float most = max_lanes(best);
  int64_t own = 0, entries = 0;
  for (int lane = 0; lane < kLanes; ++lane) entries -= count[lane];
  while (own + kLanes <= p.vocab && !any(load(e + own) == most)) own += kLanes;
  while (own < p.vocab && e[own] != most) ++own;
  if (any(strange) || !(most > -kInf && most < kInf)) return {e, 0, {kNaN, kNaN}};
  if (t == 1.0f || entries == 1) return {e, own, {}, 0.0f, 0.0, true};
  e[own] = -kInf;
  const float power = kLog2E / (1.0f - t);
  double rest = 0.0;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    rest += sum_vectors(std::min(kBlock, p.vocab - start), [&](int64_t i, int m) {
      const vf v = exp2v((load_n(e + start + i, m, -kInf) - most) * power);
      store_n(e + start + i, v, m);
      return v;
    });
  }
  const double stay = std::exp(-gain);
  return {e, own, {std::max(rest + stay, 1e-37), lift_of(gain)}, 1.0f};  // 1e-37: e_k is then 85 V
}

// A row without E: onehot(token), or NaN.
void store_plain(const PosteriorParams& p, int64_t row, int64_t token, bool valid) {
  int32_t* ids = p.ids + row * p.top;
  float* q = p.q + row * p.top;
  for (int64_t i = 0; i < p.top; ++i) {
    ids[i] = static_cast<int32_t>(i);
    q[i] = valid ? 0.0f : kNaN;
  }
  if (p.top > 0 && valid) {
    const int64_t place = std::min(token, p.top - 1);
    ids[place] = static_cast<int32_t>(token);
    q[place] = 1.0f;
  }
  p.rest[row] = !valid ? kNaN : p.top > 0 ? 0.0f : 1.0f;
  if (p.stats == nullptr) return;
  p.stats[3 * row] = p.stats[3 * row + 1] = valid ? 0.0f : kNaN;
  p.stats[3 * row + 2] = valid ? 1.0f : kNaN;
}

void store_row(const PosteriorParams& p, int64_t row, const Row& made, double gain, Selection& selection) {
  if (made.certain || !(made.split.sum() < kInf)) {
    store_plain(p, row, made.own, made.certain);
    return;
  }
  const Evidence evidence(gain, made.split.sum(), p.vocab, made.largest);
  const float own = made.own < 0 ? -kInf : p.log_prior[made.own] + own_evidence(made.split, p.vocab);
  float z[kBlock], shift = own;
  double total = 0.0;
  selection.clear();
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    evidence_block(evidence, made.e + start, p.log_prior + start, n, z);
    if (made.own >= start && made.own < start + n) z[made.own - start] = own;
    vf best = splat(-kInf);
    for_vectors(n, [&](int64_t i, int m) { best = maximum(load_n(z + i, m, -kInf), best); });
    const float top = max_lanes(best);
    if (top > shift) {
      total *= std::exp(static_cast<double>(shift) - top);
      shift = top;
    }
    if (shift > -kInf) total += sum_vectors(n, [&](int64_t i, int m) { return expv(load_n(z + i, m, -kInf) - shift); });
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
    p.stats[3 * row] = stats_of_noise(made.noise);
    p.stats[3 * row + 1] = shift;
    p.stats[3 * row + 2] = static_cast<float>(total);
  }
}

}  // namespace

void posterior(const PosteriorParams& p, int64_t begin, int64_t end) {
  Selection selection(p.top, p.vocab);
  for_dtype(p.log_x.dtype, [&](auto* type) {
    for (int64_t row = begin; row < end; ++row) {
      const float t = p.t.at(row);
      if (!(t >= 0.0f && t <= 1.0f)) {
        store_plain(p, row, 0, false);
        continue;
      }
      const double gain = gain_of<double>(t, p.c);
      const Row made =
          p.log_x.data == nullptr ? row_of_noise(p, row, gain) : row_of_state<element<decltype(type)>>(p, row, gain, t);
      store_row(p, row, made, gain, selection);
    }
  });
}

}  // namespace klflow::KLFLOW_ISA
