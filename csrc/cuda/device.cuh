// What the kernels are compiled against: CUDA, or the host machine of csrc/simt (KLFLOW_SIMT) that tests them. All
// shared memory is one dynamic buffer.
#pragma once

#if defined(KLFLOW_SIMT)
#include "../simt/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace klflow::cuda {

#if defined(KLFLOW_SIMT)
inline unsigned char* shared_memory() { return simt::shared_memory(); }
#else
extern __shared__ __align__(16) unsigned char klflow_shared[];
__device__ __forceinline__ unsigned char* shared_memory() { return klflow_shared; }
#endif

}  // namespace klflow::cuda
