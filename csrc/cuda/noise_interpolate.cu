#include "noise_interpolate.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* noise_interpolate(const NoiseInterpolateParams& p, void* stream) {
  return for_dtype(p.out.dtype, [&](auto type) {
    using Out = decltype(type);
    auto run = [&](auto kernel, int64_t element) {
      return launch_rows("noise_interpolate", kernel, p, p.rows, layout_of(p.vocab, element), stream);
    };
    if (p.log) return run(noise_interpolate_kernel<Out, true>, sizeof(typename Kept<Out, true>::Type));
    return run(noise_interpolate_kernel<Out, false>, sizeof(typename Kept<Out, false>::Type));
  });
}

}  // namespace klflow::cuda
