// What the kernels are compiled against: CUDA, or the host machine of csrc/simt (KLFLOW_SIMT) that tests them. All
// shared memory is one dynamic buffer.
#pragma once

#include <cstdint>

#if defined(KLFLOW_SIMT)
#include "../simt/simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace klflow::cuda {

struct alignas(16) Words16 {
  uint32_t w[4];
};

#if defined(KLFLOW_SIMT)
inline unsigned char* shared_memory() { return simt::shared_memory(); }
inline uint32_t cluster_rank() { return simt::cluster_rank(); }
inline uint32_t cluster_size() { return simt::cluster_size(); }
inline unsigned char* map_shared(unsigned char* mine, uint32_t rank) { return simt::map_shared(mine, rank); }
inline Words16 load16(const void* address) { return *static_cast<const Words16*>(address); }
inline void store16(void* address, const Words16& x) { *static_cast<Words16*>(address) = x; }
inline void store16_global(void* address, const Words16& x) { *static_cast<Words16*>(address) = x; }
using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* place) { return static_cast<unsigned char*>(place); }
inline Words16 load16_shared(SharedAddress address) { return load16(address); }
inline void store16_shared_if(bool condition, SharedAddress address, const Words16& x) {
  if (condition) store16(address, x);
}
#define klflow_cluster_sync() ::simt::cluster_barrier(KLFLOW_SITE)
inline int unhoisted(int x) { return x; }
inline int thread_of_row() { return static_cast<int>(threadIdx.x); }
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  auto larger = [](uint32_t x, uint32_t y) {  // of the upper halves
    const float f = __int_as_float(static_cast<int32_t>(x & 0xffff0000u));
    return max_nan(f, __int_as_float(static_cast<int32_t>(y & 0xffff0000u))) == f || f != f ? x : y;
  };
  return (larger(a, b) & 0xffff0000u) | larger(a << 16, b << 16) >> 16;
}
inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
  auto larger = [](uint32_t x, uint32_t y) {  // of the lower halves
    const float f = __half2float(__ushort_as_half(static_cast<uint16_t>(x)));
    return max_nan(f, __half2float(__ushort_as_half(static_cast<uint16_t>(y)))) == f || f != f ? x : y;
  };
  return (larger(a, b) & 0xffffu) | larger(a >> 16, b >> 16) << 16;
}
inline float lg2_approx(float x) { return simt::lg2_approx(x); }
inline float ex2_approx(float x) { return simt::ex2_approx(x); }
#else
// One 128-bit access each.
__device__ __forceinline__ Words16 load16(const void* address) {
  const uint4 x = *static_cast<const uint4*>(address);
  return {{x.x, x.y, x.z, x.w}};
}
__device__ __forceinline__ void store16(void* address, const Words16& x) {
  *static_cast<uint4*>(address) = make_uint4(x.w[0], x.w[1], x.w[2], x.w[3]);
}

// To global memory; spelled out, as the compiler splits such stores where their branch also has narrow ones.
__device__ __forceinline__ void store16_global(void* address, const Words16& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(x.w[0]),
               "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3])
               : "memory");
}

// An address of shared memory that is worked out once; from a pointer the compiler works it out again in every
// iteration of a loop, five instructions each time.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(void* place) {
  SharedAddress address = static_cast<uint32_t>(__cvta_generic_to_shared(place));
  asm volatile("" : "+r"(address));
  return address;
}
__device__ __forceinline__ Words16 load16_shared(SharedAddress address) {
  Words16 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.w[0]), "=r"(x.w[1]), "=r"(x.w[2]), "=r"(x.w[3])
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store16_shared_if(bool condition, SharedAddress address, const Words16& x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"r"(address),
               "r"(x.w[0]), "r"(x.w[1]), "r"(x.w[2]), "r"(x.w[3]), "r"(static_cast<uint32_t>(condition))
               : "memory");
}

// Thread-block clusters: blocks of neighbouring multiprocessors that read each other's shared memory. Before Hopper
// there are none: every block is a cluster of its own.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ unsigned char* map_shared(unsigned char* mine, uint32_t rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
  return reinterpret_cast<unsigned char*>(address);
}
__device__ __forceinline__ void klflow_cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
__device__ __forceinline__ constexpr uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ constexpr uint32_t cluster_size() { return 1; }
__device__ __forceinline__ unsigned char* map_shared(unsigned char* mine, uint32_t) { return mine; }
__device__ __forceinline__ void klflow_cluster_sync() { __syncthreads(); }
#endif

// x, of which the compiler does not know that it stays the same: what is worked out from it is not kept in registers
// from one row to the next.
__device__ __forceinline__ int unhoisted(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The larger, or NaN where one is that.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// The same of the two 16-bit numbers in a word.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// The same of the thread's number, which is read again.
__device__ __forceinline__ int thread_of_row() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

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
