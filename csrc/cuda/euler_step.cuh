// One basic step: p = softmax(logits / T), l = (1 - rate) log_x + rate c p, then log softmax(l) and softmax(l). The row
// of logits, and then of l, is kept in shared memory as float32 (rows too long to keep are read again), so each
// input is read once and each output written once. Bytes: two reads, two writes. Never materialised: p, l.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

template <class L, class S, class X>
__global__ void __launch_bounds__(kThreads, 2) euler_step_kernel(EulerStepParams p, bool keep) {
  const Cluster cluster;
  float* kept = keep ? reinterpret_cast<float*>(shared_memory() + kPartialBytes) : nullptr;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    if (p.given.at(row)) {
      const int64_t token = p.given.known.at(row);
      store_onehot(p.log_x_next, row, p.vocab, token, true);
      store_onehot(p.x_next, row, p.vocab, token, false);
      continue;
    }
    const float inverse = 1.0f / p.temperature.at(row, 1.0f);
    const float rate = p.rate.at(row), stay = 1.0f - rate;
    const Slice slice = slice_of(p.vocab);  // columns below are of the slice
    const L* logits = row_of<L>(p.logits, row) + slice.begin;
    const S* state = row_of<S>(p.log_x, row) + slice.begin;
    auto read_logits = [&](int column, float (&z)[kVector]) {
      const Vector<L> raw = load_vector<L>(logits, column, slice.size, from_float<L>(0.0f));
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        z[i] = column + i >= 0 && column + i < slice.size ? to_float(raw.element[i]) : -infinity();
    };
    ExpSum logits_sum = empty_sum();
    for (int column = kVector * static_cast<int>(threadIdx.x); column < slice.size; column += kVector * kThreads) {
      float z[kVector];
      read_logits(column, z);
      logits_sum.add(z, inverse * kLog2E);
      if (keep) store_kept(kept, column, z);
    }
    const ExpSum logits_all = row_exp_sum(logits_sum, inverse);
    const float gain = rate * p.c / logits_all.total;
    auto combine = [&](int column, float (&l)[kVector]) {  // z in, l out; at rate 1 log_x is not read
      const Vector<S> raw = stay != 0.0f ? load_vector<S>(state, column, slice.size, from_float<S>(0.0f)) : Vector<S>{};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float value = gain * ex2_approx((l[i] - logits_all.shift) * (inverse * kLog2E));
        if (stay != 0.0f) value += stay * to_float(raw.element[i]);
        l[i] = column + i >= 0 && column + i < slice.size ? value : -infinity();
      }
    };
    ExpSum sum = empty_sum();
    for (int column = kVector * static_cast<int>(threadIdx.x); column < slice.size; column += kVector * kThreads) {
      float l[kVector];
      if (keep)
        load_kept(kept, column, slice.size, l);
      else
        read_logits(column, l);
      combine(column, l);
      sum.add(l);
      if (keep) store_kept(kept, column, l);
    }
    const ExpSum all = row_exp_sum(sum);  // its barriers also publish what is kept
    const float inverse_total = 1.0f / all.total, log_total = logf(all.total);
    auto next = [&](int column, float (&l)[kVector]) {  // l, above its shift
      if (keep) {
        load_kept(kept, column, slice.size, l);
      } else {
        read_logits(column, l);
        combine(column, l);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) l[i] -= all.shift;
    };
    store_row(row_of<X>(p.x_next, row) + slice.begin, slice.size, [&](int column, float (&v)[kVector]) {
      next(column, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = ex2_approx(v[i] * kLog2E) * inverse_total;
    });
    __syncthreads();  // x_next has read log_x everywhere before log_x_next may overwrite it
    store_row(row_of<S>(p.log_x_next, row) + slice.begin, slice.size, [&](int column, float (&v)[kVector]) {
      next(column, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] -= log_total;
    });
    __syncthreads();  // the next row writes what was read here
  }
}

}  // namespace klflow::cuda
