#include "noise_interpolate.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* noise_interpolate(const NoiseInterpolateParams& p, void* stream) {
  return for_dtype(p.out.dtype, [&](auto type) {
    using Out = decltype(type);
    using K = typename Kept<Out>::Type;
    // log x cancels near 0, where 11 bits are too few: there 16-bit rows are made twice instead.
    Layout layout = layout_of(p.vocab, sizeof(K));
    if (p.log && sizeof(K) < sizeof(float)) layout.keep = 0;
    return launch_rows("noise_interpolate",
                       p.log ? noise_interpolate_kernel<Out, true> : noise_interpolate_kernel<Out, false>, p, p.rows,
                       layout, stream);
  });
}

}  // namespace klflow::cuda
