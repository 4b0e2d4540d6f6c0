#include "logit_interpolate.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* logit_interpolate(const LogitInterpolateParams& p, void* stream) {
  return for_dtype(p.log_x0.dtype, [&](auto in) {
    return for_dtype(p.out.dtype, [&](auto out) {
      const auto kernel = logit_interpolate_kernel<decltype(in), decltype(out)>;
      return launch_rows("logit_interpolate", kernel, p, p.rows, layout_of(p.vocab, sizeof(float)), stream);
    });
  });
}

}  // namespace klflow::cuda
