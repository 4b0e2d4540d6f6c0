#include "cross_entropy.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* cross_entropy(const CrossEntropyParams& p, void* stream) {
  const bool plain = p.target.data != nullptr && p.label_smoothing == 0.0f && p.softcap == 0.0f;
  return for_dtype(p.logits.dtype, [&](auto type) {
    using T = decltype(type);
    Layout layout = layout_of(p.vocab, sizeof(T), kCrossEntropyBytes);
    if (p.dloss.data == nullptr) layout.keep = 0;  // the row is read once
    return launch_rows("cross_entropy", plain ? cross_entropy_kernel<T, true> : cross_entropy_kernel<T, false>, p,
                       p.rows, layout, stream, kCrossEntropyBytes);
  });
}

}  // namespace klflow::cuda
