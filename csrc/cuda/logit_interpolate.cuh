// softmax((1 - t) log_x0 + t log_x1): the combined row is kept in shared memory as float32 between the sum and the
// store (rows too long to keep are read twice), so each input is read once and the output written once. Bytes: one read
// of each input, one write. Never materialised: the combined logits.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

template <class In, class Out>
__global__ void __launch_bounds__(kThreads, 2) logit_interpolate_kernel(LogitInterpolateParams p, bool keep) {
  const Cluster cluster;
  float* kept = keep ? reinterpret_cast<float*>(shared_memory() + kPartialBytes) : nullptr;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const float t = p.t.at(row);
    const bool dense = p.log_x1.data != nullptr;
    const int64_t token = dense ? -1 : p.target.at(row);
    const float poison = dense || (token >= 0 && token < p.vocab) ? 0.0f : not_a_number();
    const Slice slice = slice_of(p.vocab);  // columns below are of the slice
    const int own_column = static_cast<int>(token) - slice.begin;
    const In* log_x0 = row_of<In>(p.log_x0, row) + slice.begin;
    const In* log_x1 = dense ? row_of<In>(p.log_x1, row) + slice.begin : nullptr;
    auto combine = [&](int column, float (&l)[kVector]) {  // -infinity outside the row
      // An end point of weight 0 is not read, so that 0 * -inf is no NaN.
      const Vector<In> none{};
      const Vector<In> a = t == 1.0f ? none : load_vector<In>(log_x0, column, slice.size, from_float<In>(0.0f));
      const Vector<In> b =
          dense && t != 0.0f ? load_vector<In>(log_x1, column, slice.size, from_float<In>(0.0f)) : none;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float value = t == 1.0f ? poison : to_float(a.element[i]) * (1.0f - t) + poison;
        if (dense && t != 0.0f) value += to_float(b.element[i]) * t;
        if (!dense && column + i == own_column) value += t * p.c;
        l[i] = column + i >= 0 && column + i < slice.size ? value : -infinity();
      }
    };
    ExpSum sum = empty_sum();
    for (int column = kVector * static_cast<int>(threadIdx.x); column < slice.size; column += kVector * kThreads) {
      float l[kVector];
      combine(column, l);
      sum.add(l);
      if (keep) store_kept(kept, column, l);
    }
    const ExpSum all = row_exp_sum(sum);  // its barriers also publish what is kept
    const float inverse = 1.0f / all.total, log_total = logf(all.total);
    store_row(row_of<Out>(p.out, row) + slice.begin, slice.size, [&](int column, float (&v)[kVector]) {
      float l[kVector];
      if (keep)
        load_kept(kept, column, slice.size, l);
      else
        combine(column, l);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        v[i] = p.log ? l[i] - all.shift - log_total : ex2_approx((l[i] - all.shift) * kLog2E) * inverse;
    });
    __syncthreads();  // the next row writes what was read here
  }
}

}  // namespace klflow::cuda
