// The host machine that runs cuda/*.cuh in tests: what the kernels need of CUDA, on fibers (one per thread). Threads of
// a block run in a random order (a seed picks it) between barriers, in half of the launches with one block of a cluster
// ahead of the others, shared memory is poisoned at start, and a deadlock, a divergent barrier or a wrong shuffle mask
// ends the launch with an error that names kernel, block and threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Of the running thread.
const Dim3& thread_index();
const Dim3& block_index();
const Dim3& grid_dim();
unsigned char* shared_memory();
unsigned cluster_rank();
unsigned cluster_size();

// What kind of device the machine stands for: without clusters, or with less shared memory, its launches are errors.
struct DeviceKind {
  bool clusters;
  int64_t block_bytes, processor_bytes;  // shared memory that a block may have, and of a multiprocessor
};
const DeviceKind& device_kind();
void set_device_kind(const DeviceKind& kind);

// Runs the kernel; returns null or what went wrong. seed() changes schedule and poison of later launches.
const char* launch(const char* name, const std::function<void()>& kernel, unsigned blocks, unsigned threads,
                   size_t shared_bytes, unsigned cluster);
void seed(uint64_t value);
void last_launch(unsigned& cluster, unsigned& shared_bytes);

// Rendezvous. `site` names the place in the source; threads of one barrier must stand at the same place.
void block_barrier(const char* site);
int block_count(bool vote, const char* site);  // a barrier that counts the votes
void cluster_barrier(const char* site);
unsigned char* map_shared(unsigned char* mine, unsigned rank);
struct Lane {  // what a thread brings to a warp's rendezvous, and what it takes away
  unsigned mask;
  int source;  // lane to read; -1: none
  bool vote;
  unsigned char value[16];
  unsigned ballot;
};
void warp_rendezvous(Lane& lane, const char* site);
void maybe_yield();  // atomics: others may come first
int lane_index();

template <class T>
T shuffle(unsigned mask, T value, int source, const char* site) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Lane lane{mask, source, false, {}, 0};
  std::memcpy(lane.value, &value, sizeof(T));
  warp_rendezvous(lane, site);
  std::memcpy(&value, lane.value, sizeof(T));
  return value;
}
inline unsigned ballot(unsigned mask, bool vote, const char* site) {
  Lane lane{mask, -1, vote, {}, 0};
  warp_rendezvous(lane, site);
  return lane.ballot;
}
// The approximations with errors as large as their manual allows, so that a kernel that passes here tolerates them.
float lg2_approx(float x);
float ex2_approx(float x);
inline int clamp_lane(int lane, int own) { return lane < 0 || lane > 31 ? own : lane; }

}  // namespace simt

#define KLFLOW_STRING_(x) #x
#define KLFLOW_STRING(x) KLFLOW_STRING_(x)
#define KLFLOW_SITE __FILE__ ":" KLFLOW_STRING(__LINE__)

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define gridDim (::simt::grid_dim())
#define __syncthreads() ::simt::block_barrier(KLFLOW_SITE)
#define __syncthreads_count(vote) ::simt::block_count(vote, KLFLOW_SITE)
#define __syncwarp() ((void)::simt::ballot(~0u, false, KLFLOW_SITE))
#define __ballot_sync(mask, vote) ::simt::ballot(mask, vote, KLFLOW_SITE)
#define __shfl_sync(mask, value, lane) ::simt::shuffle(mask, value, (lane) % 32, KLFLOW_SITE)
#define __shfl_xor_sync(mask, value, bits) ::simt::shuffle(mask, value, ::simt::lane_index() ^ (bits), KLFLOW_SITE)
#define __shfl_down_sync(mask, value, delta) \
  ::simt::shuffle(mask, value, ::simt::clamp_lane(::simt::lane_index() + (delta), ::simt::lane_index()), KLFLOW_SITE)
#define __shfl_up_sync(mask, value, delta) \
  ::simt::shuffle(mask, value, ::simt::clamp_lane(::simt::lane_index() - (delta), ::simt::lane_index()), KLFLOW_SITE)
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

template <class T>
inline T atomicAdd(T* address, std::type_identity_t<T> value) {
  ::simt::maybe_yield();
  const T old = *address;
  *address = old + value;
  return old;
}

// ---- types and conversions
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}
inline float __expf(float x) { return ::simt::ex2_approx(x * 1.44269504f); }
inline float __int_as_float(int32_t i) {
  float f;
  std::memcpy(&f, &i, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float __bfloat162float(__nv_bfloat16 b) { return __int_as_float(static_cast<int32_t>(b.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t u = __float_as_uint(f);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
inline __half __ushort_as_half(uint16_t bits) {
  __half h;
  std::memcpy(&h, &bits, 2);
  return h;
}
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
