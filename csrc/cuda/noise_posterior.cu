#include "noise_posterior.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* noise_posterior(const NoisePosteriorParams& p, void* stream) {
  return launch_rows("noise_posterior", noise_posterior_kernel, p, p.rows, layout_of(p.vocab, sizeof(float)), stream,
                     kPosteriorBytes);
}

}  // namespace klflow::cuda
