// The gradient of gather_rows (ScatterRowsParams in common/params.h): a block per token, so that no sum needs atomics
// and every row of dweight is written once. Never materialised: a dense (rows x V) q. Bytes: a row of dout for each
// pair, from L2 where dout fits it, and one write of dweight.
#pragma once

#include "weighted_sum.cuh"

namespace klflow::cuda {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) scatter_rows_kernel(ScatterRowsParams p, bool) {
  for (int64_t token = first_row(); token < p.vocab; token += row_step()) {
    const int64_t start = p.starts[token];
    const float prior = p.prior[token];
    weighted_sum<T, kAligned>(
        p.dout, p.width, p.starts[token + 1] - start,
        [&](int64_t i) {
          const uint32_t pair = static_cast<uint32_t>(p.order[start + i]);
          return Weighted{static_cast<int32_t>(pair / static_cast<uint32_t>(p.top)), p.q[pair]};
        },
        [&](int64_t column, float sum) { store(p.dweight, token, column, prior * p.g[column] + sum); });
  }
}

}  // namespace klflow::cuda
