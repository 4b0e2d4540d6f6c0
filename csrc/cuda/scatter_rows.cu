#include "scatter_rows.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* scatter_rows(const ScatterRowsParams& p, void* stream) {
  return for_dtype(p.dout.dtype, [&](auto type) {
    using T = decltype(type);
    return launch("scatter_rows",
                  is_aligned(p.dout, p.width) ? scatter_rows_kernel<T, true> : scatter_rows_kernel<T, false>, p, false,
                  p.vocab, 1, sizeof(WeightedShared), stream);
  });
}

}  // namespace klflow::cuda
