// How every kernel is launched: one block per row, blocks striding over the rows.
#pragma once

#include <algorithm>

#include "row.cuh"
#if !defined(KLFLOW_SIMT)
#include <cuda_runtime.h>
#endif

namespace klflow::cuda {

template <class Params>
const char* launch_rows(const char* name, void (*kernel)(Params), const Params& params, int64_t rows, void* stream) {
  if (rows == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(rows, 1 << 30));
#if defined(KLFLOW_SIMT)
  return simt::launch(name, [&] { kernel(params); }, blocks, kThreads, kSharedBytes, 1);
#else
  kernel<<<blocks, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)> > >(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace klflow::cuda
