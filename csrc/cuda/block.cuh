// Blocks and clusters: one of them handles a row, a block of a cluster a slice of its columns; and the layout of the
// dynamic shared memory that all kernels begin with.
#pragma once

#include "device.cuh"

#include <cstdint>

namespace klflow::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// The dynamic shared memory begins with the warps' results of a reduction, two slots for the block's own, the round
// keys of a row's noise, and which slot's turn it is; then comes what the kernel itself lays out.
constexpr int kSlotBytes = 32;
constexpr int kSlots = kWarps * kSlotBytes;
constexpr int kRoundKeys = kSlots + 2 * kSlotBytes;
constexpr int kTurn = kRoundKeys + 20 * sizeof(uint32_t);
constexpr int kPartialBytes = kTurn + 16;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

// A cluster of blocks handles a row, each block a slice of its columns (cluster of one: the whole row)
struct Slice {
  int begin, size;
};
__device__ __forceinline__ Slice slice_of(int64_t vocab) {
  const int columns = static_cast<int>(vocab), blocks = static_cast<int>(cluster_size());
  const int share = ((columns + 7) / 8 + blocks - 1) / blocks * 8, begin = share * static_cast<int>(cluster_rank());
  return {begin, begin + share < columns ? share : begin < columns ? columns - begin : 0};
}
// In a kernel from begin to end: its blocks show each other the results of their reductions. A block writes these to
// its two slots in turn: a slot is read until the next cluster barrier, which is that of the next reduction.
struct Cluster {
  __device__ __forceinline__ Cluster() {
    if (threadIdx.x == 0) turn() = 0;  // read after a barrier of the first reduction
  }
  __device__ __forceinline__ ~Cluster() {
    if (cluster_size() > 1) klflow_cluster_sync();  // no block ends while another reads its slot
  }
  static __device__ __forceinline__ uint32_t& turn() { return *reinterpret_cast<uint32_t*>(shared_memory() + kTurn); }
  // The value of the one thread `mine` is written; returns its place, to be read in any block (map_shared).
  template <class T>
  static __device__ __forceinline__ unsigned char* show(const T& value, bool mine) {
    const uint32_t now = turn();
    unsigned char* slot = shared_memory() + kSlots + now * kSlotBytes;
    if (mine) *reinterpret_cast<T*>(slot) = value;
    klflow_cluster_sync();
    if (threadIdx.x == 0) turn() = 1 - now;
    return slot;
  }
};
__device__ __forceinline__ int64_t first_row() { return blockIdx.x / cluster_size(); }
__device__ __forceinline__ int64_t row_step() { return gridDim.x / cluster_size(); }
__device__ __forceinline__ bool is_leader() { return threadIdx.x == 0 && cluster_rank() == 0; }

}  // namespace klflow::cuda
