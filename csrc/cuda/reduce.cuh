// Reductions over a row in a fixed order, so that a row has the same bits wherever it lies in the batch: sums, and sums
// of exponentials.
#pragma once

#include "vector.cuh"

namespace klflow::cuda {

// Larger values have larger ordered bits.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 counts as 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of_bits(uint32_t ordered) {
  return __int_as_float(static_cast<int32_t>(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered));
}

// A reduction over the cluster: a fixed tree over its blocks and their warps, the result in every thread. unrolled:
// all warps' results are read into registers at once, of which a large T may leave too few.
template <bool clustered = true, bool unrolled = true, class T, class Combine>
__device__ __forceinline__ T row_reduce(T value, Combine combine) {
  static_assert(sizeof(T) <= kSlotBytes);
  T* partial = reinterpret_cast<T*>(shared_memory());
  for (int offset = 16; offset > 0; offset /= 2) value = combine(value, value.shuffle_down(offset));
  __syncthreads();  // the previous reduction's results have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T total = partial[0];
  if constexpr (unrolled) {
    for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp]);
  } else {
#pragma unroll 1
    for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp]);
  }
  if (clustered && cluster_size() > 1) {
    unsigned char* slot = shared_memory() + kWarps * kSlotBytes;
    if (threadIdx.x == 0) *reinterpret_cast<T*>(slot) = total;
    klflow_cluster_sync();
    total = *reinterpret_cast<const T*>(map_shared(slot, 0));
    for (uint32_t rank = 1; rank < cluster_size(); ++rank)
      total = combine(total, *reinterpret_cast<const T*>(map_shared(slot, rank)));
    klflow_cluster_sync();  // read by all before the next reduction, or the end of a block
  }
  return total;
}

struct Sum {
  double value;
  __device__ __forceinline__ Sum shuffle_down(int offset) const { return {__shfl_down_sync(~0u, value, offset)}; }
};
template <bool clustered = true>
__device__ __forceinline__ double row_sum(double value) {
  return row_reduce<clustered>(Sum{value}, [](Sum a, Sum b) { return Sum{a.value + b.value}; }).value;
}

// total * exp(scale * shift): a sum of exponentials of scale * z that never overflows. The shift is some z, subtracted
// before anything is multiplied, so that a common offset, and masks of any size, leave the differences as they are. NaN
// and +infinity end as NaN, as in torch.
struct ExpSum {
  float shift, total;
  __device__ __forceinline__ ExpSum shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, shift, offset), __shfl_down_sync(~0u, total, offset)};
  }
  __device__ __forceinline__ void add(const float (&z)[kVector], float scale = 1.0f) {
    float top = shift;
#pragma unroll
    for (int i = 0; i < kVector; ++i) top = fmaxf(top, z[i]);  // a NaN is passed over here and met below
    if (top > shift) {
      if (shift != -infinity()) total *= __expf((shift - top) * scale);
      shift = top;
    }
    const float base = top == -infinity() ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += __expf((z[i] - base) * scale);
  }
};
__device__ __forceinline__ ExpSum combine(ExpSum a, ExpSum b, float scale) {
  if (a.shift == -infinity()) return {b.shift, a.total + b.total};  // totals of nothing are 0, of NaN alone NaN
  if (b.shift == -infinity()) return {a.shift, a.total + b.total};
  const float shift = fmaxf(a.shift, b.shift);
  return {shift, a.total * expf((a.shift - shift) * scale) + b.total * expf((b.shift - shift) * scale)};
}
__device__ __forceinline__ ExpSum empty_sum() { return {-infinity(), 0.0f}; }
// Of the whole row. exp(scale * z - lse) is exp(scale * (z - shift)) / total.
__device__ __forceinline__ ExpSum row_exp_sum(ExpSum mine, float scale = 1.0f) {
  return row_reduce(mine, [scale](ExpSum a, ExpSum b) { return combine(a, b, scale); });
}

}  // namespace klflow::cuda
