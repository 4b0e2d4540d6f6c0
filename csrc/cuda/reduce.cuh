// Reductions over a row in a fixed order, so that a row has the same bits wherever it lies in the batch: sums, prefix
// sums, bins of counts, and sums of exponentials.
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

// A value of another lane of the warp.
template <class T>
__device__ __forceinline__ T from_lane(const T& value, uint32_t lane) {
  static_assert(sizeof(T) % 4 == 0);
  union Words {
    T value;
    uint32_t word[sizeof(T) / 4];
    __device__ __forceinline__ Words() {}
  } words;
  words.value = value;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i)
    words.word[i] = __shfl_sync(~0u, words.word[i], static_cast<int>(lane));
  return words.value;
}

// A reduction over the cluster: a fixed tree over the lanes of a warp, over the warps, and over the cluster's blocks,
// the same result in every thread.
template <bool clustered = true, class T, class Combine>
__device__ __forceinline__ T row_reduce(T value, Combine combine) {
  static_assert(sizeof(T) <= kSlotBytes);
  T* partial = reinterpret_cast<T*>(shared_memory());
  const uint32_t thread = static_cast<uint32_t>(thread_of_row()), lane = thread % 32;
  auto over_lanes = [&](uint32_t lanes) {  // into the first of so many lanes
#pragma unroll 1
    for (uint32_t offset = lanes / 2; offset > 0; offset /= 2) value = combine(value, from_lane(value, lane + offset));
  };
  over_lanes(32);
  __syncthreads();  // the previous reduction's results have been read
  if (lane == 0) partial[thread / 32] = value;
  __syncthreads();
  value = partial[lane % kWarps];
  over_lanes(kWarps);
  if (clustered && cluster_size() > 1) {
    unsigned char* slot = Cluster::show(value, thread == 0);
    value = *reinterpret_cast<const T*>(map_shared(slot, lane % cluster_size()));
    over_lanes(cluster_size());
  }
  return from_lane(value, 0);
}

template <bool clustered = true>
__device__ __forceinline__ double row_sum(double value) {
  return row_reduce<clustered>(value, [](double a, double b) { return a + b; });
}

constexpr int kBins = 256;
// The bin of kBins in which a running count reaches k, what is left of k within it, and what it holds; of this block,
// or (clustered) of the sum over the cluster's blocks. The same in every thread.
struct Bin {
  uint32_t index, left, count;
};
template <bool clustered>
__device__ __forceinline__ Bin find_bin(uint32_t* counts, uint32_t k) {
  constexpr int kOwn = kBins / 32;
  const uint32_t lane = static_cast<uint32_t>(thread_of_row()) % 32;
  uint32_t own[kOwn] = {};
#pragma unroll 1  // registers
  for (uint32_t rank = 0; rank < (clustered ? cluster_size() : 1); ++rank) {
    unsigned char* mine = reinterpret_cast<unsigned char*>(counts + kOwn * lane);
    const unsigned char* theirs = clustered && cluster_size() > 1 ? map_shared(mine, rank) : mine;
#pragma unroll
    for (int part = 0; part < kOwn / 4; ++part) {
      const Words16 words = load16(theirs + 16 * part);
#pragma unroll
      for (int i = 0; i < 4; ++i) own[4 * part + i] += words.w[i];
    }
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i];
  uint32_t before = sum;
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += other;
  }
  before -= sum;
  Bin bin{0, 0, 0};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < k && k <= before + own[i]) bin = {kOwn * lane + i, k - before, own[i]};
    before += own[i];
  }
  const int source = __ffs(__ballot_sync(~0u, bin.left > 0)) - 1;
  return {__shfl_sync(~0u, bin.index, source), __shfl_sync(~0u, bin.left, source), __shfl_sync(~0u, bin.count, source)};
}

// The sum of the values of all threads before this one, in order of the cluster's blocks and their threads.
template <bool clustered = true>
__device__ __forceinline__ uint64_t row_prefix(uint64_t value) {
  uint64_t* partial = reinterpret_cast<uint64_t*>(shared_memory());
  const uint32_t thread = static_cast<uint32_t>(thread_of_row()), lane = thread % 32, warp = thread / 32;
  uint64_t inclusive = value;
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  __syncthreads();  // the previous reduction's results have been read
  if (lane == 31) partial[warp] = inclusive;
  __syncthreads();
  uint64_t before = inclusive - value;
#pragma unroll 1
  for (uint32_t w = 0; w < warp; ++w) before += partial[w];
  if (clustered && cluster_size() > 1) {
    unsigned char* slot = Cluster::show(before + value, thread == kThreads - 1);
#pragma unroll 1
    for (uint32_t rank = 0; rank < cluster_rank(); ++rank)
      before += *reinterpret_cast<const uint64_t*>(map_shared(slot, rank));
  }
  return before;
}

constexpr float kLog2E = 1.44269504f;

// total * exp(scale * shift): a sum of exponentials of scale * z that never overflows. The shift is some z, or the
// least number while there is none above it, subtracted before anything is multiplied, so that a common offset, and
// masks of any size, leave the differences as they are. NaN and +infinity end as NaN, as in torch.
struct ExpSum {
  float shift, total;
  // unit: scale log2(e).
  __device__ __forceinline__ void add(const float (&z)[kVector], float unit = kLog2E) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < kVector; ++i) top = fmaxf(top, z[i]);  // a NaN is passed over here and met below
    raise(top, unit);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += ex2_approx((z[i] - shift) * unit);
  }
  __device__ __forceinline__ void add(float z, float unit = kLog2E) {
    raise(z, unit);
    total += ex2_approx((z - shift) * unit);
  }
  __device__ __forceinline__ void raise(float top, float unit) {
    if (top > shift) {
      total *= ex2_approx((shift - top) * unit);
      shift = top;
    }
  }
};
__device__ __forceinline__ ExpSum empty_sum() { return {-3.4028235e38f, 0.0f}; }
// Of the whole row. exp(scale * z - lse) is exp(scale * (z - shift)) / total.
__device__ __forceinline__ ExpSum row_exp_sum(ExpSum mine, float scale = 1.0f) {
  return row_reduce(mine, [scale](ExpSum a, ExpSum b) {
    const float shift = fmaxf(a.shift, b.shift);
    return ExpSum{shift, a.total * expf((a.shift - shift) * scale) + b.total * expf((b.shift - shift) * scale)};
  });
}

}  // namespace klflow::cuda
