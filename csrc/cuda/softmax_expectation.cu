#include "softmax_expectation.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* softmax_expectation(const SoftmaxExpectationParams& p, void* stream) {
  return for_dtype(p.logits.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t fixed = expectation_bytes(p.knots);
    return launch_rows("softmax_expectation", softmax_expectation_kernel<T>, p, p.rows,
                       layout_of(p.vocab, sizeof(T), fixed), stream, fixed);
  });
}

}  // namespace klflow::cuda
