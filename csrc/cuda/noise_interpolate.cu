#include "noise_interpolate.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* noise_interpolate(const NoiseInterpolateParams& params, void* stream) {
  return launch_rows("noise_interpolate", noise_interpolate_kernel, params, params.rows, stream);
}

}  // namespace klflow::cuda
