#include "posterior.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* posterior(const PosteriorParams& p, void* stream) {
  const Layout layout = layout_of(p.vocab, sizeof(float));
  auto launch_kernel = [&](auto kernel) {
    return launch_rows("posterior", kernel, p, p.rows, layout, stream, kPosteriorBytes);
  };
  auto launch_source = [&](auto source) {
    using Source = decltype(source);
    return launch_kernel(layout.keep > 0 ? posterior_kernel<true, Source> : posterior_kernel<false, Source>);
  };
  if (p.log_x.data != nullptr)
    return for_dtype(p.log_x.dtype, [&](auto type) { return launch_source(StateSource<decltype(type)>{}); });
  if (p.boost == nullptr) return launch_source(NoiseSource{});
  if (layout.keep == 0) return "boost: rows of more than 442368 columns do not fit the shared memory of a cluster";
  return launch_kernel(posterior_kernel<true, BoostedSource>);
}

}  // namespace klflow::cuda
