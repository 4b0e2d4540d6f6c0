#include "topk_sample.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

// Beyond the queue every block of a cluster would read the whole row: one block a row then.
static unsigned blocks_of(int64_t k) { return k <= kMaxQueued ? 8 : 1; }

const char* topk_sample(const TopkSampleParams& p, void* stream) {
  return for_dtype(p.logits.dtype, [&](auto type) {
    using T = decltype(type);
    return launch_rows("topk_sample", topk_sample_kernel<T>, p, p.rows,
                       layout_of(p.vocab, sizeof(T), kTopkBytes, blocks_of(p.k)), stream, kTopkBytes);
  });
}

const char* topk_renoise(const TopkRenoiseParams& p, void* stream) {
  return for_dtype(p.sample.logits.dtype, [&](auto in) {
    return for_dtype(p.out.dtype, [&](auto out) {
      using T = decltype(in);
      using Out = decltype(out);
      const int64_t element = std::max(sizeof(T), sizeof(typename Kept<Out>::Type));
      return launch_rows("topk_renoise", topk_renoise_kernel<T, Out>, p, p.sample.rows,
                         layout_of(p.sample.vocab, element, kTopkBytes, blocks_of(p.sample.k)), stream, kTopkBytes);
    });
  });
}

}  // namespace klflow::cuda
