#include "cross_entropy.cuh"

#include "launch.cuh"
#include "launch.h"

namespace klflow::cuda {

const char* cross_entropy(const CrossEntropyParams& params, void* stream) {
  return launch_rows("cross_entropy", cross_entropy_kernel, params, params.rows, stream);
}

}  // namespace klflow::cuda
