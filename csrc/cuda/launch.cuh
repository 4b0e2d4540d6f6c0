// How every kernel is launched: one block per row, blocks striding over the rows, all shared memory dynamic.
#pragma once

#include <algorithm>

#include "row.cuh"
#if !defined(KLFLOW_SIMT)
#include <cuda_runtime.h>
#endif

namespace klflow::cuda {

// Bytes of shared memory in which a block may keep its row, beside what else it needs, of the 227 KB that Hopper gives
// a block. Up to about 105 KB two blocks share a multiprocessor. Longer rows are read (or made) again in every pass.
constexpr int64_t kKeepLimit = 216 << 10;

// The bytes that keep a row of V elements, 0 where it is too long.
inline int64_t keep_bytes(int64_t vocab, int64_t element_bytes) {
  const int64_t bytes = (vocab + kVector - 1) / kVector * kVector * element_bytes;
  return bytes <= kKeepLimit ? bytes : 0;
}

// keep: bytes of the kept row, 0 for none; fixed: bytes of shared memory before it.
template <class Params>
const char* launch_rows(const char* name, void (*kernel)(Params, bool), const Params& params, int64_t rows,
                        int64_t keep, void* stream, int64_t fixed = kPartialBytes) {
  if (rows == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(rows, 1 << 30));
  const size_t shared = fixed + keep;
#if defined(KLFLOW_SIMT)
  return simt::launch(name, [&] { kernel(params, keep > 0); }, blocks, kThreads, shared, 1);
#else
  cudaError_t error = cudaSuccess;
  if (shared > 48 << 10)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared));
  if (error == cudaSuccess) {
    bool keep_row = keep > 0;
    void* arguments[] = {const_cast<Params*>(&params), &keep_row};
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, kThreads, arguments, shared,
                             static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

// f(T{}) with the C++ type of a dtype.
template <class F>
const char* for_dtype(int32_t dtype, F&& f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(__nv_bfloat16{});
  return f(__half{});
}

}  // namespace klflow::cuda
