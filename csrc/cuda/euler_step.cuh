// One basic step: p = softmax(logits / T), l = (1 - rate) log_x + rate c p, then log softmax(l) and softmax(l).
// Never materialised: p, l. Reads both inputs per pass, from L2 after the first; writes both outputs once.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

__global__ void __launch_bounds__(kThreads) euler_step_kernel(EulerStepParams p, bool) {
  const float inverse = 1.0f / p.temperature;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    if (is_given(p.given, row)) {
      const int64_t token = token_at(p.given.known, row);
      store_onehot(p.log_x_next, row, p.vocab, token, true);
      store_onehot(p.x_next, row, p.vocab, token, false);
      continue;
    }
    const float rate = scalar_at(p.rate, row, 0.0f), keep = 1.0f - rate, gain = rate * p.c;
    ExpSum logits_sum = empty_sum();
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) logits_sum.add(load(p.logits, row, j) * inverse);
    const float logits_lse = block_lse(logits_sum);
    auto logit = [&](int64_t j) {
      const float l = gain * expf(load(p.logits, row, j) * inverse - logits_lse);
      return keep != 0.0f ? l + keep * load(p.log_x, row, j) : l;
    };
    ExpSum sum = empty_sum();
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) sum.add(logit(j));
    const float lse = block_lse(sum);
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) {  // in place: a thread reads its element, then writes it
      const float l = logit(j) - lse;
      store(p.log_x_next, row, j, l);
      store(p.x_next, row, j, expf(l));
    }
  }
}

}  // namespace klflow::cuda
