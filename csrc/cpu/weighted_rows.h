// out = scale * base + sum_i weight_i row_i: the sum that gather_rows and scatter_rows are made of. It stays in
// registers over as many columns as fit; rows are added in their order, so the bits depend on nothing else.
#pragma once

#include "row.h"

namespace klflow::KLFLOW_ISA {

// Vectors of the sum held at a time: three quarters of the registers.
#if defined(__AVX512F__)
constexpr int kHeld = 24;
#else
constexpr int kHeld = 12;
#endif

template <class T>
struct WeightedRow {
  const T* data;
  float weight;
};

// Columns [0, kVectors * kLanes) of the sum; `ahead` rows are fetched into the cache before they are needed.
template <int kVectors, class Out, class Row>
KLFLOW_INLINE void weighted_block(int64_t column, float scale, const float* base, int64_t n, const Row& row, Out* out) {
  constexpr int64_t kAhead = 4;
  vf sum[kVectors];
#pragma GCC unroll 24
  for (int j = 0; j < kVectors; ++j) sum[j] = load(base + column + j * kLanes) * scale;
  for (int64_t i = 0; i < n; ++i) {
    const auto next = row(std::min(i + kAhead, n - 1)).data + column;
#pragma GCC unroll 24
    for (int64_t j = 0; j < kVectors * kLanes * static_cast<int64_t>(sizeof(*next)); j += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next) + j);
    const auto [data, weight] = row(i);
    if (weight == 0.0f) continue;
#pragma GCC unroll 24
    for (int j = 0; j < kVectors; ++j) sum[j] += load(data + column + j * kLanes) * weight;
  }
#pragma GCC unroll 24
  for (int j = 0; j < kVectors; ++j) store(out + column + j * kLanes, sum[j]);
}

// row(i): the i-th WeightedRow.
template <class Out, class Row>
void weighted_rows(float scale, const float* base, int64_t n, int64_t width, const Row& row, Out* out) {
  int64_t column = 0;
  for (; column + kHeld * kLanes <= width; column += kHeld * kLanes)
    weighted_block<kHeld>(column, scale, base, n, row, out);
  for (; column + 4 * kLanes <= width; column += 4 * kLanes) weighted_block<4>(column, scale, base, n, row, out);
  for_vectors(width - column, [&](int64_t offset, int m) {
    vf sum = load_n(base + column + offset, m, 0.0f) * scale;
    for (int64_t i = 0; i < n; ++i) {
      const auto [data, weight] = row(i);
      if (weight != 0.0f) sum += load_n(data + column + offset, m, 0.0f) * weight;
    }
    store_n(out + column + offset, sum, m);
  });
}

}  // namespace klflow::KLFLOW_ISA
