// Sums of rows, each with its own weight: what gather_rows and scatter_rows share. A block makes one sum: its threads
// stand in groups, each wide enough for 8 columns a thread (up to 4,096 columns at once), and a group adds every
// groups-th row of the list in order, several loads in flight; then the groups' sums are added in order. So the order
// of every sum depends on the width and the list alone.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

constexpr int kListed = 1024;  // rows of the list in shared memory at a time

struct Weighted {
  int32_t row;
  float weight;
};
struct WeightedShared {
  Weighted listed[kListed];
  float partial[kThreads * kVector];  // of each group
};

// write(column, sum of item(i).weight * rows[item(i).row][column] over i < count), the columns over the block's
// threads. kAligned: every row begins at a multiple of 16 bytes, and the width is a multiple of 8.
template <class T, bool kAligned, class Item, class Write>
__device__ __forceinline__ void weighted_sum(const Rows& rows, int64_t width, int64_t count, Item&& item,
                                             Write&& write) {
  constexpr int kInFlight = kAligned ? 4 : 1;  // loads of a thread; the shifts of unaligned ones take its registers
  WeightedShared& s = *reinterpret_cast<WeightedShared*>(shared_memory());
  for (int64_t first = 0; first < width; first += kThreads * kVector) {
    const int columns = static_cast<int>(width - first < kThreads * kVector ? width - first : kThreads * kVector);
    const int lanes = (columns + kVector - 1) / kVector, groups = kThreads / lanes;
    const int thread = unhoisted(static_cast<int>(threadIdx.x)), group = thread / lanes, lane = thread % lanes;
    const int column = kVector * lane;
    const T* base = static_cast<const T*>(rows.data) + first;
    float sum[kVector] = {};
    for (int64_t begin = 0; begin < count; begin += kListed) {
      const int listed = static_cast<int>(count - begin < kListed ? count - begin : kListed);
      __syncthreads();  // what was listed before has been read
      for (int i = static_cast<int>(threadIdx.x); i < listed; i += kThreads) s.listed[i] = item(begin + i);
      __syncthreads();
      auto load_row = [&](int32_t row) {
        const T* address = base + row * rows.stride;
        return kAligned ? load_aligned(address + column)
                        : load_vector<T>(address, column, columns, from_float<T>(0.0f));
      };
      auto add = [&](const Vector<T>& row, float weight) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[i] += weight * to_float(row.element[i]);
      };
      int i = group < groups ? group : listed;
      for (; i + (kInFlight - 1) * groups < listed; i += kInFlight * groups) {
        Vector<T> loaded[kInFlight];
        float weight[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
          const Weighted w = s.listed[i + k * groups];
          loaded[k] = load_row(w.row);
          weight[k] = w.weight;
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) add(loaded[k], weight[k]);
      }
      for (; i < listed; i += groups) add(load_row(s.listed[i].row), s.listed[i].weight);
    }
    if (count > 0 && group < groups) {
#pragma unroll
      for (int part = 0; part < kVector / 4; ++part) {
        Words16 words;
#pragma unroll
        for (int i = 0; i < 4; ++i) words.w[i] = __float_as_uint(sum[4 * part + i]);
        store16(s.partial + kVector * (group * lanes + lane) + 4 * part, words);
      }
    }
    __syncthreads();
    for (int j = static_cast<int>(threadIdx.x); j < columns; j += kThreads) {
      float total = 0.0f;
      for (int g = 0; g < groups && count > 0; ++g) total += s.partial[kVector * lanes * g + j];
      write(first + j, total);
    }
  }
}

inline bool is_aligned(const Rows& rows, int64_t width) {
  const int64_t element = rows.dtype == kFloat32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride * element % 16 == 0 && width % kVector == 0;
}

}  // namespace klflow::cuda
