#include "gather_rows.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* gather_rows(const GatherRowsParams& p, void* stream) {
  return for_dtype(p.weight.dtype, [&](auto type) {
    using T = decltype(type);
    return launch("gather_rows",
                  is_aligned(p.weight, p.width) ? gather_rows_kernel<T, true> : gather_rows_kernel<T, false>, p, false,
                  p.rows, 1, sizeof(WeightedShared), stream);
  });
}

}  // namespace klflow::cuda
