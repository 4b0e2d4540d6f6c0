// Tiles of the noisy rows that noise_embedding multiplies by the weight: columns [column, column + columns) of y or q,
// from in-kernel noise. Never built: the (rows x V) rows themselves.
#include "dispatch.h"
#include "evidence.h"

namespace klflow::KLFLOW_ISA {

namespace {

// E of one column, in units of ln 2: the bits that it has in its row.
float exponential(const PhiloxKey& key, int64_t column) {
  vf v[2 * kChains];
  exponentials(key, column / 4 * 4, v);
  return v[0][column % 4];
}

// q_j = exp(z_j - shift) / total over the tile, or log q_j.
void posterior_tile(const NoiseTileParams& p, int64_t row, const PhiloxKey& key, int64_t token, double gain, float* q) {
  const float* stats = p.stats + 3 * row;
  const float shift = stats[1], scale = 1.0f / stats[2];
  const double noise = noise_of_stats(stats[0]), own = exponential(key, token);
  for (int64_t i = 0; i < p.columns; i += kNoiseColumns) {
    vf v[2 * kChains];
    exponentials(key, p.column + i, v);
    for (int j = 0; j < 2 * kChains; ++j) store(q + i + j * kLanes, v[j]);
  }
  const Split<double> split = split_of_noise(noise, own, gain, gain);
  evidence_block(Evidence(gain, split.sum(), p.vocab), q, p.log_prior + p.column, p.columns, q);
  if (token >= p.column && token < p.column + p.columns)
    q[token - p.column] = p.log_prior[token] + own_evidence(split, p.vocab);
  const float log_total = std::log(stats[2]);
  for_vectors(p.columns, [&](int64_t i, int m) {
    const vf z = load_n(q + i, m, -kInf) - shift;
    store_n(q + i, p.log ? z - log_total : expv(z) * scale, m);
  });
}

}  // namespace

void noise_tile(const NoiseTileParams& p, int64_t begin, int64_t end) {
  for_dtype(p.out.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    for (int64_t row = begin; row < end; ++row) {
      T* out = row_of<T>(p.out, row);
      const int64_t token = p.target.at(row);
      const bool mine = token >= p.column && token < p.column + p.columns;
      const float t = p.t.at(row);
      const double gain = gain_of<double>(t, p.c);
      if (p.given.at(row) || (p.sum == nullptr && is_certain(gain))) {
        fill_row(out, p.columns, p.log ? -kInf : 0.0f);
        if (mine) out[token - p.column] = from_float<T>(p.log ? 0.0f : 1.0f);
        if (p.sum != nullptr && mine) p.sum[row] += 1.0;
        continue;
      }
      const PhiloxKey key = philox_key(p.rng, row, kSimplexNoise);
      float* y = scratch_row(p.columns);
      if (p.sum == nullptr) {
        posterior_tile(p, row, key, token, gain, y);
      } else {
        double sum = noise_row<false, false>(key, p.column, p.columns, 1.0f - t, y, [](int64_t) {});
        if (mine) {
          const double own = y[token - p.column], boost = static_cast<double>(t) * p.c;
          sum += own * std::expm1(boost);
          y[token - p.column] = static_cast<float>(own * std::exp(boost));
        }
        p.sum[row] += sum;
      }
      write_span(out, 0, p.columns, false, false, [&](int64_t i, int m) { return load_n(y + i, m, 0.0f); });
    }
  });
}

}  // namespace klflow::KLFLOW_ISA
