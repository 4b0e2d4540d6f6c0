#include "noise_posterior.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* noise_posterior(const NoisePosteriorParams& p, void* stream) {
  const Layout layout = layout_of(p.vocab, sizeof(float));
  return launch_rows("noise_posterior", layout.keep > 0 ? noise_posterior_kernel<true> : noise_posterior_kernel<false>,
                     p, p.rows, layout, stream, kPosteriorBytes);
}

}  // namespace klflow::cuda
