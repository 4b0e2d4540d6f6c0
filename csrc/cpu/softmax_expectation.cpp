// mean = sum_j p_j f(log p_j) over one row at a time: a streaming read for the lse, then a read, mostly from cache,
// that looks f up. Never built: probabilities, their logarithms. The weights are divided by their own sum: what is
// wrong with all of them alike, changes nothing. See SoftmaxExpectationParams.
#include "../common/expectation.h"
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

struct Cells {
  vf value, difference;
};
// One cell for each lane, each read at once.
KLFLOW_INLINE Cells gather(const Cell* cells, vi index) {
#if defined(__AVX512F__)
  const __m512i i = reinterpret_cast<__m512i>(index);
  const double* base = reinterpret_cast<const double*>(cells);
  const __m512 low = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_castsi512_si256(i), base, 8));
  const __m512 high = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_extracti64x4_epi64(i, 1), base, 8));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  return {reinterpret_cast<vf>(_mm512_permutex2var_ps(low, even, high)),
          reinterpret_cast<vf>(_mm512_permutex2var_ps(low, odd, high))};
#elif defined(__AVX2__)
  const __m256i i = reinterpret_cast<__m256i>(index);
  const double* base = reinterpret_cast<const double*>(cells);
  const __m256 low = _mm256_castpd_ps(_mm256_i32gather_pd(base, _mm256_castsi256_si128(i), 8));
  const __m256 high = _mm256_castpd_ps(_mm256_i32gather_pd(base, _mm256_extracti128_si256(i, 1), 8));
  auto in_order = [](__m256 x) {  // a shuffle works on each half alone
    return reinterpret_cast<vf>(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
  };
  return {in_order(_mm256_shuffle_ps(low, high, 0x88)), in_order(_mm256_shuffle_ps(low, high, 0xdd))};
#else
  Cells result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Cell cell = cells[index[lane]];
    result.value[lane] = cell.value;
    result.difference[lane] = cell.difference;
  }
  return result;
#endif
}

template <class T>
void run_row(const SoftmaxExpectationParams& p, int64_t row, const Cell* cells) {
  const T* logits = row_of<T>(p.logits, row);
  StreamingSum sum;
  for (int64_t start = 0; start < p.vocab; start += kBlock) sum.add(logits + start, std::min(kBlock, p.vocab - start));
  const RowPlaces places = places_of(sum.shift(), sum.log_total(), p.scale);
  const float scale = p.scale, last = static_cast<float>(p.knots - 1);
  double weight = 0.0, product = 0.0;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    vf weights[4] = {}, products[4] = {};
    auto add = [&](int64_t i, int m, int chain) {
      const vf x = load_n(logits + start + i, m, -kInf) - places.lse;  // the lanes past the end weigh nothing
      // Log p is above 0 by its rounding alone. Of a row without a mean it is NaN, and the place 0.
      vf place = maximum(places.offset - x * scale, vf{});
      place = minimum(place, splat(last));
      const vf cell = round_down(place);
      const Cells f = gather(cells, __builtin_convertvector(cell, vi));
      const vf e = expv(x);
      weights[chain] += e;
      products[chain] += e * (f.value + f.difference * (place - cell));
    };
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int chain = 0; chain < 4; ++chain) add(i + chain * kLanes, kLanes, chain);
    }
    for_vectors(n - i, [&](int64_t k, int m) { add(i + k, m, 0); });
    weight += sum_lanes((weights[0] + weights[1]) + (weights[2] + weights[3]));
    product += sum_lanes((products[0] + products[1]) + (products[2] + products[3]));
  }
  p.lse[row] = places.lse;
  p.mean[row] = static_cast<float>(product / weight);
}

}  // namespace

void softmax_expectation(const SoftmaxExpectationParams& p, int64_t begin, int64_t end) {
  Cell* cells = reinterpret_cast<Cell*>(scratch_row(2 * p.knots));
  int64_t made = -1;  // whose cells these are
  for_dtype(p.logits.dtype, [&](auto* type) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t table = row / p.table_rows;
      if (table != made) {
        for (int64_t k = 0; k < p.knots; ++k) cells[k] = cell_of(p.table + table * p.knots, p.knots, k);
        made = table;
      }
      run_row<element<decltype(type)>>(p, row, cells);
    }
  });
}

}  // namespace klflow::KLFLOW_ISA
