// The CUDA ops as ops.cpp sees them: no CUDA headers, the stream as void*. Each returns null or an error text.
#pragma once

#include "../common/params.h"

namespace klflow::cuda {

const char* noise_interpolate(const NoiseInterpolateParams& params, void* stream);
const char* logit_interpolate(const LogitInterpolateParams& params, void* stream);
const char* cross_entropy(const CrossEntropyParams& params, void* stream);
const char* topk_sample(const TopkSampleParams& params, void* stream);
const char* topk_renoise(const TopkRenoiseParams& params, void* stream);
const char* euler_step(const EulerStepParams& params, void* stream);
const char* noise_tile(const NoiseTileParams& params, void* stream);
const char* posterior(const PosteriorParams& params, void* stream);
// The rows, and columns of each, of the scratch tensor that `posterior` needs on the current device; no rows: none.
int64_t posterior_scratch_rows(const PosteriorParams& params);
int64_t posterior_scratch_columns(const PosteriorParams& params);
const char* gather_rows(const GatherRowsParams& params, void* stream);
const char* scatter_rows(const ScatterRowsParams& params, void* stream);

}  // namespace klflow::cuda
