// The CUDA ops as csrc/ops sees them: no CUDA headers, the stream as void*. Each returns null or an error text.
#pragma once

#include "../common/ops.h"

namespace klflow {

namespace cuda {
#define KLFLOW_DECLARE(op, Params) const char* op(const Params& params, void* stream);
KLFLOW_OPS(KLFLOW_DECLARE)
#undef KLFLOW_DECLARE

// The rows, and columns of each, of the scratch tensor that `posterior` needs on the current device; no rows: none.
int64_t posterior_scratch_rows(const PosteriorParams& params);
int64_t posterior_scratch_columns(const PosteriorParams& params);
}  // namespace cuda

// The same functions of a shared library that stands in for the CPU kernels (tests: the SIMT machine of csrc/simt),
// which exports the table as klflow_backend().
struct Backend {
#define KLFLOW_MEMBER(op, Params) const char* (*op)(const Params&, void*);
  KLFLOW_OPS(KLFLOW_MEMBER)
#undef KLFLOW_MEMBER
  int64_t (*posterior_scratch_rows)(const PosteriorParams&);  // or null: it never needs any
  int64_t (*posterior_scratch_columns)(const PosteriorParams&);
};

}  // namespace klflow
