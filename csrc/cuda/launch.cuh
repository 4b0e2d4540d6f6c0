// How every kernel is launched: one block per row, blocks striding over the rows.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "row.cuh"

namespace klflow::cuda {

template <class Params>
const char* launch_rows(void (*kernel)(Params), const Params& params, int64_t rows, void* stream) {
  if (rows == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(rows, 1 << 30));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace klflow::cuda
