// x_t straight from the noise contract. Never materialised: x_0, log x_0, l_t. Bytes: one write of the row.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

template <class Out, bool kLog>
__global__ void __launch_bounds__(kThreads, 2) noise_interpolate_kernel(NoiseInterpolateParams p, bool keep) {
  const Cluster cluster;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const int64_t token = p.target.at(row);
    if (p.given.at(row))
      store_onehot(p.out, row, p.vocab, token, p.log);
    else
      noise_interpolate_row<kLog, kPartialBytes>(row_of<Out>(p.out, row), p.vocab, noise_key(p.rng, row), token,
                                                 p.t.at(row), p.c, keep);
  }
}

}  // namespace klflow::cuda
