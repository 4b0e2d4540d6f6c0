// The embedding of sparse rows (GatherRowsParams in common/params.h): a block per row. Never materialised: the gathered
// rows of the weight. Bytes: top rows of the weight for each row, from L2 as far as the tokens in use fit it; that is
// the bound.
#pragma once

#include "weighted_sum.cuh"

namespace klflow::cuda {

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2) gather_rows_kernel(GatherRowsParams p, bool) {
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const float rest = p.rest[row];
    weighted_sum<T, kAligned>(
        p.weight, p.width, p.top, [&](int64_t i) { return Weighted{p.ids[row * p.top + i], p.q[row * p.top + i]}; },
        [&](int64_t column, float sum) { store(p.out, row, column, sum + rest * p.mean[column]); });
  }
}

}  // namespace klflow::cuda
