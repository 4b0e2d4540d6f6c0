#include "logit_interpolate.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* logit_interpolate(const LogitInterpolateParams& params, void* stream) {
  return launch_rows("logit_interpolate", logit_interpolate_kernel, params, params.rows, 0, stream);
}

}  // namespace klflow::cuda
