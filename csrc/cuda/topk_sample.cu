#include "topk_sample.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* topk_sample(const TopkSampleParams& params, void* stream) {
  return launch_rows("topk_sample", topk_sample_kernel, params, params.rows, stream);
}

const char* topk_renoise(const TopkRenoiseParams& params, void* stream) {
  return launch_rows("topk_renoise", topk_renoise_kernel, params, params.sample.rows, stream);
}

}  // namespace klflow::cuda
