#include "euler_step.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* euler_step(const EulerStepParams& params, void* stream) {
  return launch_rows("euler_step", euler_step_kernel, params, params.rows, 0, stream);
}

}  // namespace klflow::cuda
