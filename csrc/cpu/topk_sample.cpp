// token ~ softmax(top-k of logits / temperature), restricted to the smallest set of mass >= top_p. One read of the row
// keeps the maxima of groups of kDepth columns; the k-th largest maximum bounds the k-th logit from below, and only the
// blocks that reach it are visited again, while in cache: few candidates remain. Then a Gumbel-max draw over the k kept
// with the noise contract's accurate small-E tail. topk_renoise appends the re-noising of the drawn token. Never built:
// sorted rows, probabilities, x_0.
#include <numeric>

#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

// ---- keys: integers in the order of the logits, of the logits' width; a row is compared without being converted
typedef int16_t vs __attribute__((vector_size(4 * kLanes)));
typedef int16_t vs_half __attribute__((vector_size(2 * kLanes)));

template <class T>
struct Keys;
template <>
struct Keys<float> {
  using Key = int32_t;
  using Vector = vi;
  static constexpr Key kInfinity = 0x7f800000;
};
template <>
struct Keys<bf16> {
  using Key = int16_t;
  using Vector = vs;
  static constexpr Key kInfinity = 0x7f80;
};
template <>
struct Keys<fp16> {
  using Key = int16_t;
  using Vector = vs;
  static constexpr Key kInfinity = 0x7c00;
};

// Its own inverse. -0 is -1, one below +0.
template <class Key, class V>
KLFLOW_INLINE V ordered(V bits) {
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & std::numeric_limits<Key>::max());
}

// a >= b, one bit a lane.
KLFLOW_INLINE uint64_t at_least(vi a, vi b) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(a >= b));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(a >= b));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint64_t>(a[i] >= b[i]) << i;
  return bits;
#endif
}
KLFLOW_INLINE uint64_t at_least(vs a, vs b) {
#if defined(__AVX512F__)
  return _mm512_cmpge_epi16_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
#elif defined(__AVX2__)
  const __m256i mask = reinterpret_cast<__m256i>(a >= b);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(mask), _mm256_extracti128_si256(mask, 1));
  return _mm_movemask_epi8(bytes);
#elif defined(__SSE2__)
  return _mm_movemask_epi8(_mm_packs_epi16(reinterpret_cast<__m128i>(a >= b), __m128i{}));
#else
  uint64_t bits = 0;
  for (int i = 0; i < 2 * kLanes; ++i) bits |= static_cast<uint64_t>(a[i] >= b[i]) << i;
  return bits;
#endif
}

// How many of n keys, a multiple of kLanes, are at least t.
int64_t count_at_least(const int32_t* keys, int64_t n, int32_t t) {
  vi count = {};
  for (int64_t i = 0; i < n; i += kLanes) count -= load_raw<vi>(keys + i) >= t;
  int64_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += count[i];
  return total;
}

// A t that at least k of n keys reach: k + slack at most or, where ties prevent that, the k-th largest key. Bisection
// in [low, high]: at least k keys reach low, none is above high.
int32_t kth_largest(const int32_t* keys, int64_t n, int64_t k, int64_t slack, int64_t low, int64_t high) {
  ++high;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const int64_t count = count_at_least(keys, n, static_cast<int32_t>(middle));
    if (count >= k)
      low = middle;
    else
      high = middle;
    if (count >= k && count <= k + slack) break;
  }
  return static_cast<int32_t>(low);
}

// e^x for x <= 0, to 1e-14 of its value; 0 below e^-700.
typedef double vd __attribute__((vector_size(4 * kLanes)));
typedef float vf_half __attribute__((vector_size(2 * kLanes)));
KLFLOW_INLINE vd exp_double(vd x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52: its last bits take the rounded number
  const vd shifted = x * 1.4426950408889634 + kMagic, n = shifted - kMagic;
  const vd r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // log 2 in two parts
  vd p = vd{} + 1.0 / 39916800;
  for (const double factorial : {3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1}) p = p * r + 1.0 / factorial;
  const vu64 bits = reinterpret_cast<vu64>(p) + (reinterpret_cast<vu64>(shifted) << 52);
  return reinterpret_cast<vd>(bits & ~reinterpret_cast<vu64>(x < -700.0));
}

constexpr int kDraw = kChains * kLanes;  // columns drawn at a time

// Words of the columns' counters.
KLFLOW_INLINE void philox_at(const PhiloxKey& key, const int32_t* columns, vu (&words)[kChains]) {
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {  // even and odd columns: a counter fills a 64-bit lane
    vu64 column[kChains], c0[kChains], c1[kChains], c2[kChains], c3[kChains];
    each_chain([&](int i) {
      const vu64 pair = load_raw<vu64>(columns + i * kLanes);
      column[i] = odd ? pair >> 32 : pair & 0xffffffffull;
      c0[i] = column[i] >> 2;
      c1[i] = vu64{} + key.row;
      c2[i] = vu64{} + key.step;
      c3[i] = vu64{} + key.stream;
    });
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      vu64 p0[kChains], p1[kChains];
      each_chain([&](int i) { p0[i] = multiply_low(c0[i], kPhiloxM0); });
      each_chain([&](int i) { p1[i] = multiply_low(c2[i], kPhiloxM1); });
      each_chain([&](int i) { c0[i] = (p1[i] >> 32) ^ c1[i] ^ key.round_keys[2 * round]; });
      each_chain([&](int i) { c2[i] = (p0[i] >> 32) ^ c3[i] ^ key.round_keys[2 * round + 1]; });
      each_chain([&](int i) { c1[i] = p1[i], c3[i] = p0[i]; });
    }
    each_chain([&](int i) {
      const vu64 bit0 = -(column[i] & 1), bit1 = -(column[i] >> 1 & 1);
      const vu64 first = c0[i] ^ ((c0[i] ^ c1[i]) & bit0), second = c2[i] ^ ((c2[i] ^ c3[i]) & bit0);
      const vu64 word = first ^ ((first ^ second) & bit1);
      words[i] = odd ? words[i] | reinterpret_cast<vu>(word << 32) : reinterpret_cast<vu>(word & 0xffffffffull);
    });
  }
}

template <class T>
class Draw {
 public:
  explicit Draw(const TopkSampleParams& p) : p_(p) {}

  // The drawn token of a row, -1 where there is none; its log-probability in log_prob.
  __attribute__((noinline)) int64_t run(int64_t row, float& log_prob) {
    log_prob = kNaN;
    if (p_.given.at(row)) {
      log_prob = 0.0f;
      return p_.given.known.at(row);
    }
    row_ = row_of<T>(p_.logits, row);
    temperature_ = p_.temperature.at(row);
    top_p_ = p_.top_p.at(row);
    place_scratch();
    if (!select()) return -1;
    log_prob = 0.0f;
    if (p_.k == 1) return columns_[0];
    double total = 0.0;
    load_logits(p_.k);
    const int64_t n = top_p_ < 1.0f ? nucleus(total) : p_.k;
    const int64_t winner = choose(row, n, total);
    log_prob = static_cast<float>(scaled(winner) - std::log(total));
    return columns_[winner];
  }

 private:
  using Key = typename Keys<T>::Key;
  using Vector = typename Keys<T>::Vector;
  static constexpr Key kInfinity = Keys<T>::kInfinity;
  static constexpr Key kLowest = ~kInfinity;  // of -infinity
  static constexpr int kKeys = sizeof(Vector) / sizeof(Key);
  static constexpr int kDepth = 16;                   // columns of a group: one lane of this many vectors
  static constexpr int64_t kGroups = kKeys * kDepth;  // columns of a block of kKeys groups
  static_assert(kGroups % 64 == 0 && kGroups % kDraw == 0);

  void place_scratch() {
    const int64_t size = (p_.vocab + kGroups - 1) / kGroups * kGroups;
    float* room = scratch_row(6 * size, 3);
    columns_ = reinterpret_cast<int32_t*>(room);
    keys_ = reinterpret_cast<int32_t*>(room + size);
    logits_ = room + 2 * size;
    scores_ = room + 3 * size;
    masses_ = reinterpret_cast<double*>(room + 4 * size);
    maxima_ = reinterpret_cast<int32_t*>(logits_);
    values_ = reinterpret_cast<T*>(scores_);
  }

  int32_t key(int64_t column) const {
    Key bits;
    std::memcpy(&bits, row_ + column, sizeof(bits));
    const int32_t key = ordered<Key>(bits);
    return key == -1 ? 0 : key;
  }
  // Columns [begin, begin + kGroups) of the row, or a copy of the last ones that continues with -infinity.
  const Key* block(int64_t begin) const {
    return begin + kGroups <= p_.vocab ? reinterpret_cast<const Key*>(row_) + begin : tail_;
  }
  double scaled(int64_t i) const { return (static_cast<double>(logits_[i]) - top_) / temperature_; }

  // Fills columns_ with the k best of the row, in ascending order; false where it holds a NaN or nothing finite on top.
  bool select() {
    const int64_t vocab = p_.vocab, k = p_.k, ragged = vocab % kGroups;
    std::memcpy(tail_, row_ + vocab - ragged, ragged * sizeof(Key));
    std::fill(tail_ + ragged, tail_ + kGroups, static_cast<Key>(kInfinity | std::numeric_limits<Key>::min()));

    Vector magnitude = {};
    int64_t groups = 0;
    vi lowest = vi{} + std::numeric_limits<int32_t>::max(), highest = ~lowest;
    for (int64_t begin = 0; begin < vocab; begin += kGroups) {
      const Key* z = block(begin);
      Vector best = Vector{} + std::numeric_limits<Key>::min();
#pragma GCC unroll 16
      for (int j = 0; j < kDepth; ++j) {
        const Vector bits = load_raw<Vector>(z + j * kKeys), absolute = bits & std::numeric_limits<Key>::max();
        const Vector keys = ordered<Key>(bits);
        magnitude = magnitude > absolute ? magnitude : absolute;
        best = best > keys ? best : keys;
      }
      vi maxima[kKeys / kLanes];
      if constexpr (sizeof(Key) == 4) {
        maxima[0] = best;
      } else {
        vs_half halves[2];
        std::memcpy(halves, &best, sizeof(best));
        for (int i = 0; i < 2; ++i) maxima[i] = __builtin_convertvector(halves[i], vi);
      }
      for (const vi& m : maxima) {
        lowest = lowest < m ? lowest : m;
        highest = highest > m ? highest : m;
        std::memcpy(maxima_ + groups, &m, sizeof(m));
        groups += kLanes;
      }
    }
    if (at_least(magnitude, Vector{} + static_cast<Key>(kInfinity + 1)) != 0) return false;
    int32_t low = lowest[0], high = highest[0];
    for (int i = 1; i < kLanes; ++i) low = std::min(low, lowest[i]), high = std::max(high, highest[i]);
    if (high == kInfinity || high == kLowest) return false;

    int32_t bound = kLowest;
    if (2 * k <= groups) {
      const int64_t folded = fold(groups, 4 * k);
      bound = kth_largest(maxima_ + groups, folded, k, k / 8, low, high);
    }
    if (bound == 0) bound = -1;  // -0 is as good as +0
    const int64_t n = collect(static_cast<Key>(bound));
    if (n > k) keep_k(n, bound, std::max(high, 0));
    return true;
  }

  // Merges the n groups into about `wanted`, whose maxima follow theirs: a bound still, and fewer to search.
  int64_t fold(int64_t n, int64_t wanted) {
    const int64_t folded = std::min(n, (wanted + kLanes - 1) / kLanes * kLanes);
    int32_t* to = maxima_ + n;
    std::memcpy(to, maxima_, folded * sizeof(int32_t));
    for (int64_t i = folded, j = 0; i < n; i += kLanes, j = j + kLanes < folded ? j + kLanes : 0) {
      const vi a = load_raw<vi>(maxima_ + i), b = load_raw<vi>(to + j), most = a > b ? a : b;
      std::memcpy(to + j, &most, sizeof(most));
    }
    return folded;
  }

  // Candidates: the columns whose keys reach the bound, in ascending order.
  int64_t collect(Key bound) {
    const int64_t vocab = p_.vocab;
    int64_t n = 0;
    const int32_t* maxima = maxima_;
    for (int64_t begin = 0; begin < vocab; begin += kGroups, maxima += kKeys) {
      vi reached = load_raw<vi>(maxima) >= bound;
      if constexpr (kKeys > kLanes) reached |= load_raw<vi>(maxima + kLanes) >= bound;
      if (!any(reached)) continue;
      const Key* z = block(begin);
      const int64_t columns = std::min(kGroups, vocab - begin);
      for (int64_t i = 0; i < columns; i += 64) {
        uint64_t hits = 0;
#pragma GCC unroll 16
        for (int j = 0; j < 64; j += kKeys)
          hits |= at_least(ordered<Key>(load_raw<Vector>(z + i + j)), Vector{} + bound) << j;
        if (columns - i < 64) hits &= (1ull << (columns - i)) - 1;
        for (; hits != 0; hits &= hits - 1) {
          columns_[n] = static_cast<int32_t>(begin + i + __builtin_ctzll(hits));
          keys_[n] = key(columns_[n]);
          ++n;
        }
      }
    }
    return n;
  }

  // Of n > k candidates in [low, high], the k largest: ties to the lower column.
  void keep_k(int64_t n, int32_t low, int32_t high) {
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(keys_ + n, keys_ + padded, std::numeric_limits<int32_t>::min());
    const int32_t kth = kth_largest(keys_, padded, p_.k, 0, low, high);
    int64_t ties = p_.k - count_at_least(keys_, padded, kth + 1), kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool tie = keys_[i] == kth;
      columns_[kept] = columns_[i];
      kept += (keys_[i] > kth) | (tie & (ties > 0));
      ties -= tie;
    }
  }

  // logits_ and top_ of n columns; what follows up to a multiple of kDraw has no mass.
  void load_logits(int64_t n) {
    for (int64_t i = 0; i < n; ++i) values_[i] = row_[columns_[i]];
    vf top = splat(-kInf);
    for_vectors(n, [&](int64_t i, int m) {
      const vf z = load_n(values_ + i, m, -kInf);
      top = maximum(z, top);
      store(logits_ + i, z);
    });
    top_ = max_lanes(top);
    pad(n);
  }
  void pad(int64_t n) {
    const int64_t padded = (n + kDraw - 1) / kDraw * kDraw;
    std::fill(columns_ + n, columns_ + padded, 0);
    std::fill(logits_ + n, logits_ + padded, -kInf);
  }

  // The masses of the candidates; returns their sum.
  double weigh() {
    const double inverse = 1.0 / temperature_;
    vd sum = {};
    for (int64_t i = 0; i < p_.k; i += kHalf) {
      const vd z = __builtin_convertvector(load_raw<vf_half>(logits_ + i), vd);
      const vd mass = exp_double((z - static_cast<double>(top_)) * inverse);
      std::memcpy(masses_ + i, &mass, sizeof(mass));
      sum += mass;
    }
    double total = 0.0;
    for (int lane = 0; lane < kHalf; ++lane) total += sum[lane];
    return total;
  }

  // Larger logits have larger bits.
  static uint32_t rising_bits(float z) {
    int32_t bits;
    z += 0.0f;  // -0 counts as 0
    std::memcpy(&bits, &z, 4);
    return static_cast<uint32_t>(ordered<int32_t>(bits)) ^ 0x80000000u;
  }

  // Keeps the smallest most likely set of the candidates with mass >= top_p, ties to the lower column, and returns its
  // size; its mass in total. The last of the set is found digit by digit of its bits: the masses of the candidates that
  // share the digits found so far are summed by their next digit, until few candidates are left to be sorted.
  int64_t nucleus(double& total) {
    constexpr int64_t kFew = 64;
    constexpr uint32_t kDigits = 2048;
    const double wanted = std::max(top_p_ * weigh(), 1e-300);  // the largest of mass 1 is kept at any top_p
    int32_t* left = keys_;
    int64_t n = p_.k;
    std::iota(left, left + n, 0);
    for (const int shift : {21, 10, 0}) {
      if (n <= kFew) break;
      double mass[kDigits] = {};
      auto digit = [&](int32_t i) { return rising_bits(logits_[i]) >> shift & (kDigits - 1); };
      for (int64_t i = 0; i < n; ++i) mass[digit(left[i])] += masses_[left[i]];
      uint32_t last = 0;
      double above = total;
      for (uint32_t d = kDigits; d-- > 0 && above < wanted;)
        if (mass[d] > 0.0) last = d, total = above, above += mass[d];
      int64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int32_t candidate = left[i];
        left[kept] = candidate;
        kept += digit(candidate) == last;
      }
      n = kept;
    }
    auto before = [&](int32_t a, int32_t b) { return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b); };
    if (!std::is_sorted(left, left + n, before)) std::sort(left, left + n, before);
    int64_t taken = 0;
    do {
      total += masses_[left[taken++]];
    } while (taken < n && total < wanted);
    const int32_t last = left[taken - 1];
    const float bound = logits_[last];
    n = 0;
    for (int64_t i = 0; i < p_.k; ++i) {
      const float z = logits_[i];
      columns_[n] = columns_[i];
      logits_[n] = z;
      n += (z > bound) | ((z == bound) & (i <= last));
    }
    pad(n);
    return n;
  }

  // The index of the candidate of the best score, logit / temperature - log E, ties to the lower column; their mass in
  // total where that is 0. Scores from the high words alone, in float32, leave out all but a few candidates.
  int64_t choose(int64_t row, int64_t n, double& total) {
    constexpr float kMargin = 1e-4f;  // far above the error of these scores
    const PhiloxKey key = philox_key(p_.rng, row, kTokenDrawHigh);
    const bool add = total == 0.0;
    vf best = splat(-kInf);
    for (int64_t i = 0; i < n; i += kDraw) {
      vu words[kChains];
      philox_at(key, columns_ + i, words);
      vf v[kChains], e[kChains], score[kChains], mass = {};
      each_chain([&](int c) { v[c] = simplex_uniformv(words[c]), e[c] = 1.0f - v[c]; });
      vf rounded[kChains];
      each_chain([&](int c) { rounded[c] = 1.0f - e[c]; });
      log2_chains(e);
      each_chain([&](int c) { e[c] *= v[c] / -rounded[c]; });  // E / ln 2 = -log1p(-v) / ln 2, whatever 1 - v loses
      log2_chains(e);
      each_chain([&](int c) {
        const vf z = (load(logits_ + i + c * kLanes) - top_) / temperature_;
        mass += expv(z);
        score[c] = z - e[c] * 0.69314718f;
        const vi unsure = reinterpret_cast<vi>(words[c] >> 20) == 0;  // where the low word counts
        best = maximum(unsure ? splat(-kInf) : score[c], best);
        store(scores_ + i + c * kLanes, unsure ? splat(kInf) : score[c]);
      });
      if (add) total += sum_lanes(mass);
    }
    const float enough = max_lanes(best) - kMargin;
    int64_t winner = -1, close = 0;
    auto for_close = [&](auto&& f) {
      for (int64_t i = 0; i < n; ++i)
        if (scores_[i] >= enough) f(i);
    };
    for_close([&](int64_t i) { winner = i, ++close; });
    if (close == 1) return winner;
    double best_score = -kInf;
    for_close([&](int64_t i) {
      const double score = scaled(i) - std::log(static_cast<double>(exponential(key, columns_[i])));
      if (score > best_score || (score == best_score && columns_[i] < columns_[winner])) best_score = score, winner = i;
    });
    return winner;
  }

  static float exponential(const PhiloxKey& key, uint32_t column) {
    const uint32_t k0 = static_cast<uint32_t>(key.round_keys[0]), k1 = static_cast<uint32_t>(key.round_keys[1]);
    return token_exponential(philox(column / 4, key.row, key.step, kTokenDrawHigh, k0, k1).w[column % 4],
                             philox(column / 4, key.row, key.step, kTokenDrawLow, k0, k1).w[column % 4]);
  }

  const TopkSampleParams& p_;
  float temperature_ = 1.0f, top_p_ = 1.0f;  // of the row
  const T* row_ = nullptr;
  float top_ = 0.0f;  // the largest logit
  int32_t *columns_, *keys_, *maxima_;
  float *logits_, *scores_;  // maxima_ lies in logits_, values_ in scores_: each is done before the other is written
  double* masses_;
  T* values_;
  Key tail_[kGroups];
};

}  // namespace

void topk_sample(const TopkSampleParams& p, int64_t begin, int64_t end) {
  for_dtype(p.logits.dtype, [&](auto* type) {
    Draw<element<decltype(type)>> draw(p);
    for (int64_t row = begin; row < end; ++row) {
      float log_prob;
      p.token[row] = draw.run(row, log_prob);
      if (p.log_prob != nullptr) p.log_prob[row] = log_prob;
    }
  });
}

void topk_renoise(const TopkRenoiseParams& p, int64_t begin, int64_t end) {
  const TopkSampleParams& s = p.sample;
  for_dtype(s.logits.dtype, [&](auto* in_type) {
    for_dtype(p.out.dtype, [&](auto* out_type) {
      using Out = element<decltype(out_type)>;
      Draw<element<decltype(in_type)>> draw(s);
      NoiseRows<Out> noise(s.rows, s.vocab, p.c, false);
      for (int64_t row = begin; row < end; ++row) {
        float log_prob;
        const int64_t token = draw.run(row, log_prob);
        s.token[row] = token;
        if (s.log_prob != nullptr) s.log_prob[row] = log_prob;
        Out* out = row_of<Out>(p.out, row);
        if (token < 0)
          fill_row(out, s.vocab, kNaN);
        else if (s.given.at(row))
          store_onehot(out, s.vocab, token, false);
        else
          noise.add(philox_key(s.rng, row, kSimplexNoise), token, p.t_next.at(row), out);
      }
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
