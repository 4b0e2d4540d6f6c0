#include "noise_tile.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

const char* noise_tile(const NoiseTileParams& p, void* stream) {
  return for_dtype(p.out.dtype, [&](auto type) {
    using Out = decltype(type);
    const auto kernel = p.log_prior == nullptr ? noise_tile_kernel<Out, false, false>
                        : p.log                ? noise_tile_kernel<Out, true, true>
                                               : noise_tile_kernel<Out, true, false>;
    return launch("noise_tile", kernel, p, false, (p.rows + kWarps - 1) / kWarps, 1, kTileBytes, stream);
  });
}

}  // namespace klflow::cuda
