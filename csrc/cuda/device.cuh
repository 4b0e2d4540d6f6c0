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
inline float lg2_approx(float x) { return simt::lg2_approx(x); }
inline float ex2_approx(float x) { return simt::ex2_approx(x); }
#else
// The special-function unit's logarithm and exponential. Error, by the PTX manual: lg2 2^-22 absolute for x in (1/2,
// 2), 2^-22 relative elsewhere; ex2 2^-22 relative.
__device__ __forceinline__ float lg2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
extern __shared__ __align__(16) unsigned char klflow_shared[];
__device__ __forceinline__ unsigned char* shared_memory() { return klflow_shared; }
#endif

}  // namespace klflow::cuda
