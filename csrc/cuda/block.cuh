// Blocks and clusters: one of them handles a row, a block of a cluster a slice of its columns; and the layout of the
// dynamic shared memory that all kernels begin with.
#pragma once

#include "device.cuh"

#include <cstdint>

namespace klflow::cuda {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// The dynamic shared memory begins with the partial results of a reduction; then comes what the kernel itself lays out.
constexpr int kSlotBytes = 32;
constexpr int kRoundKeys = kWarps * kSlotBytes + kSlotBytes;            // after the block's own result, for its cluster
constexpr int kPartialBytes = kRoundKeys + 20 * sizeof(uint32_t) + 16;  // and the round keys of a row's noise

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
__device__ __forceinline__ int64_t first_row() { return blockIdx.x / cluster_size(); }
__device__ __forceinline__ int64_t row_step() { return grid_of_row() / cluster_size(); }
__device__ __forceinline__ bool is_leader() { return threadIdx.x == 0 && cluster_rank() == 0; }

}  // namespace klflow::cuda
