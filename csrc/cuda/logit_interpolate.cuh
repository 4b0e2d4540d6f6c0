// softmax((1 - t) log_x0 + t log_x1): two reads of the inputs (the second from L2 for rows that fit), one write.
// Never materialised: the combined logits.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

__global__ void __launch_bounds__(kThreads) logit_interpolate_kernel(LogitInterpolateParams p, bool) {
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float t = scalar_at(p.t, row, 0.0f);
    const bool dense = p.log_x1.data != nullptr;
    const int64_t token = dense ? -1 : token_at(p.target, row);
    const float poison = dense || (token >= 0 && token < p.vocab) ? 0.0f : not_a_number();
    auto logit = [&](int64_t j) {  // an end point of weight 0 is not read, so that 0 * -inf is no NaN
      float l = t == 1.0f ? poison : load(p.log_x0, row, j) * (1.0f - t) + poison;
      if (dense && t != 0.0f) l += load(p.log_x1, row, j) * t;
      return j == token ? l + t * p.c : l;
    };
    ExpSum sum = empty_sum();
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) sum.add(logit(j));
    const float lse = block_lse(sum);
    for (int64_t j = threadIdx.x; j < p.vocab; j += kThreads) {
      const float l = logit(j) - lse;
      store(p.out, row, j, p.log ? l : expf(l));
    }
  }
}

}  // namespace klflow::cuda
