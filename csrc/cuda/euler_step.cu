#include "euler_step.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* euler_step(const EulerStepParams& p, void* stream) {
  return for_dtype(p.logits.dtype, [&](auto logits) {
    return for_dtype(p.log_x.dtype, [&](auto state) {
      return for_dtype(p.x_next.dtype, [&](auto next) {
        const auto kernel = euler_step_kernel<decltype(logits), decltype(state), decltype(next)>;
        return launch_rows("euler_step", kernel, p, p.rows, layout_of(p.vocab, sizeof(float)), stream);
      });
    });
  });
}

}  // namespace klflow::cuda
