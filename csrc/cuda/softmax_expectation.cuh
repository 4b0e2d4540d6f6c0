// mean = sum_j p_j f(log p_j), f a table: the lse first, then the sum, while the row waits in shared memory; rows too
// long for that are read twice. The cells of the table lie in shared memory too. Never materialised: probabilities,
// their logarithms. The weights are divided by their own sum. Formulas: common/expectation.h.
#pragma once

#include "../common/expectation.h"
#include "row.cuh"

namespace klflow::cuda {

// Shared memory before the kept slice: the row's places, then the cells.
constexpr int kPlacesBytes = 16;
inline __host__ __device__ int expectation_bytes(int64_t knots) {
  return kPartialBytes + kPlacesBytes + static_cast<int>((knots * static_cast<int64_t>(sizeof(Cell)) + 15) / 16 * 16);
}

struct WeightedSum {
  double weight, product;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) softmax_expectation_kernel(SoftmaxExpectationParams p, bool keep) {
  const Cluster cluster;
  RowPlaces* shared_places = reinterpret_cast<RowPlaces*>(shared_memory() + kPartialBytes);
  Cell* cells = reinterpret_cast<Cell*>(shared_memory() + kPartialBytes + kPlacesBytes);
  T* kept = keep ? reinterpret_cast<T*>(shared_memory() + expectation_bytes(p.knots)) : nullptr;
  const float last_place = static_cast<float>(p.knots - 1);
  int64_t made = -1;  // whose cells these are
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const Slice slice = slice_of(p.vocab);  // columns below are of the slice
    const int thread = unhoisted(static_cast<int>(threadIdx.x));
    const int64_t table = row / p.table_rows;
    if (table != made) {  // read by all before the barriers of the last row's sums
#pragma unroll 4          // reads that wait together
      for (int k = thread; k < p.knots; k += kThreads) cells[k] = cell_of(p.table + table * p.knots, p.knots, k);
      made = table;
    }

    const T* logits = row_of<T>(p.logits, row) + slice.begin;
    ExpSum sum = empty_sum();
    for (int column = kVector * thread; column < slice.size; column += kVector * kThreads) {
      const Vector<T> raw = load_vector<T>(logits, column, slice.size, from_float<T>(-infinity()));
      if (keep) store_aligned(kept + column, raw);
      float z[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) z[i] = to_float(raw.element[i]);
      sum.add(z);
    }
    const ExpSum all = row_exp_sum(sum);  // its barriers also publish the cells
    if (threadIdx.x == 0) {               // one thread: elsewhere than in data centres doubles are slow
      *shared_places = places_of(all.shift, ::log(static_cast<double>(all.total)), p.scale);
      if (cluster_rank() == 0) p.lse[row] = shared_places->lse;
    }
    __syncthreads();
    const RowPlaces places = *shared_places;

    WeightedSum mine = {0.0, 0.0};
    for (int column = kVector * thread; column < slice.size; column += kVector * kThreads) {
      const Vector<T> raw =
          keep ? load_aligned(kept + column) : load_vector<T>(logits, column, slice.size, from_float<T>(-infinity()));
      float weight = 0.0f, product = 0.0f;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float x = to_float(raw.element[i]) - places.lse;
        // Log p is above 0 by its rounding alone. Of a row without a mean it is NaN, and the place 0.
        const float place = fminf(fmaxf(fmaf(-x, p.scale, places.offset), 0.0f), last_place);
        // The whole number below, without a conversion (a quarter of the speed of an addition): the last bits of a sum
        // with 1.5 * 2^23. Of a whole number perhaps the one before, where f ends in the same value.
        const float magic = 12582912.0f, moved = (place - 0.5f) + magic;
        const Cell cell = cells[__float_as_uint(moved) - __float_as_uint(magic)];
        const float e = __expf(x);
        weight += e;
        product += e * fmaf(cell.difference, place - (moved - magic), cell.value);
      }
      mine.weight += weight;
      mine.product += product;
    }
    const WeightedSum whole = row_reduce(
        mine, [](WeightedSum a, WeightedSum b) { return WeightedSum{a.weight + b.weight, a.product + b.product}; });
    if (is_leader()) p.mean[row] = static_cast<float>(whole.product / whole.weight);
  }
}

}  // namespace klflow::cuda
