// The ops of cuda/ as a table: what a shared library that stands in for the CPU kernels (tests: the SIMT machine of
// csrc/simt) exports as klflow_backend().
#pragma once

#include "../common/params.h"

namespace klflow {

struct Backend {
  const char* (*noise_interpolate)(const NoiseInterpolateParams&, void*);
  const char* (*logit_interpolate)(const LogitInterpolateParams&, void*);
  const char* (*cross_entropy)(const CrossEntropyParams&, void*);
  const char* (*topk_sample)(const TopkSampleParams&, void*);
  const char* (*topk_renoise)(const TopkRenoiseParams&, void*);
  const char* (*euler_step)(const EulerStepParams&, void*);
  const char* (*noise_tile)(const NoiseTileParams&, void*);
  const char* (*posterior)(const PosteriorParams&, void*);
  const char* (*gather_rows)(const GatherRowsParams&, void*);
  const char* (*scatter_rows)(const ScatterRowsParams&, void*);
  int64_t (*posterior_scratch_rows)(const PosteriorParams&);  // or null: it never needs any
  int64_t (*posterior_scratch_columns)(const PosteriorParams&);
};

}  // namespace klflow
