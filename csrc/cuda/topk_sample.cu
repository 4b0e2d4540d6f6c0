#include "topk_sample.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* topk_sample(const TopkSampleParams& p, void* stream) {
  return launch_rows("topk_sample", topk_sample_kernel, p, p.rows, 0, stream);
}

const char* topk_renoise(const TopkRenoiseParams& p, void* stream) {
  return for_dtype(p.out.dtype, [&](auto type) {
    using Out = decltype(type);
    const int64_t keep = keep_bytes(p.sample.vocab, sizeof(typename Kept<Out>::Type));
    return launch_rows("topk_renoise", topk_renoise_kernel<Out>, p, p.sample.rows, keep, stream);
  });
}

}  // namespace klflow::cuda
