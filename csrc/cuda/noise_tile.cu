#include "noise_tile.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* noise_tile(const NoiseTileParams& p, void* stream) {
  return for_dtype(p.out.dtype, [&](auto type) {
    using Out = decltype(type);
    return launch("noise_tile", p.log_prior != nullptr ? noise_tile_kernel<Out, true> : noise_tile_kernel<Out, false>,
                  p, false, (p.rows + kWarps - 1) / kWarps, 1, kTileBytes, stream);
  });
}

}  // namespace klflow::cuda
