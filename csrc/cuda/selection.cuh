// The `top` largest z of a row that waits in shared (or scratch) memory, a slice of it in each block of the cluster:
// select_top finds the top-th largest of them, weigh_row the masses of what is selected and of the rest, and
// store_selected writes the entries in ascending order of column.
#pragma once

#include "evidence.cuh"

namespace klflow::cuda {

constexpr int kQuad = 4;  // columns that a thread handles together: one counter of the noise
constexpr int kStride = kQuad * kThreads;
constexpr int kDigits = 4;
constexpr int kQueuedZ = 1024;
constexpr int kGroups = 2 * kThreads;  // of columns: each thread has two
constexpr float kBinsPerNat = 16.0f;   // of the groups' maxima, below the largest

// In shared memory.
struct SelectionShared {
  uint32_t counts[kDigits * kBins];  // of each radix digit; before that, the last: of the groups' maxima
  uint32_t queue[kQueuedZ];          // falling bits of z
  uint32_t queued;
  uint32_t unused[3];

  __device__ __forceinline__ void clear() {
    const int thread = thread_of_row();
#pragma unroll
    for (int i = 0; i < kDigits * kBins / kThreads; ++i) counts[kThreads * i + thread] = 0;
    if (threadIdx.x == 0) queued = 0;
  }
};

// A block's slice of a row: E, later z.
struct KeptRow {
  float* kept;
  int size;
  int first;  // column of this thread's first quad; they are kStride apart
};

__device__ __forceinline__ void load_quad(const float* address, float (&x)[kQuad]) {
  const Words16 words = load16(address);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) x[i] = __int_as_float(static_cast<int32_t>(words.w[i]));
}
__device__ __forceinline__ void store_quad(float* address, const float (&x)[kQuad]) {
  store16(address, {{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}});
}

// Larger z have smaller falling bits.
__device__ __forceinline__ uint32_t falling_bits(float z) { return ~ordered_bits(z); }

__device__ __forceinline__ float row_max(float value) {  // NaN where one is that
  return row_reduce(value, [](float a, float b) { return max_nan(a, b); });
}

// What is selected: every z above `last`, the top-th largest, and the first `wanted` of the `equals` z that equal it.
struct Selected {
  float last;
  uint32_t wanted, equals;
};

// In three steps. Bound: the top-th largest of the maxima of small groups of columns, from bins of how far they are
// below the largest of them, `most`, bounds the top-th z from below. Queue: the few z above that bound. Radix: a
// descent over the digits of their bits (of the row's, where they overflow the queue) finds the top-th z exactly, and
// how many of its equals belong. maxima: of this thread's two groups, the row's token aside. s has been cleared before
// a barrier.
__device__ __forceinline__ Selected select_top(const KeptRow& row, int64_t top, float most, const float (&maxima)[2],
                                               SelectionShared& s) {
  if (top == 0) {
    __syncthreads();  // what is kept is read by other threads
    return {infinity(), 0, 0};
  }
  Selected selected{infinity(), 0, 0};
  // Bound
  float bound = -infinity();
  if (top <= kGroups) {
    uint32_t* counts = s.counts + (kDigits - 1) * kBins;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float place = (most - maxima[i]) * kBinsPerNat;
      atomicAdd(&counts[place < kBins - 1 ? static_cast<int>(place) : kBins - 1], 1u);
    }
    __syncthreads();
    const uint32_t bin = find_bin<false>(counts, static_cast<uint32_t>(top)).index;
    if (bin < kBins - 1) bound = most - (static_cast<float>(bin) + 1.001f) / kBinsPerNat;
    bound = row_max(bound);
    const int thread = thread_of_row();
    if (thread < kBins) counts[thread] = 0;
  }

  // Queue
  for (int column = row.first; column < row.size; column += kStride) {
    float z[kQuad];
    load_quad(row.kept + column, z);
    if (!(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) >= bound)) continue;
    uint32_t taken = 0;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) taken += z[i] >= bound && column + i < row.size;
    uint32_t place = atomicAdd(&s.queued, taken);
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (z[i] >= bound && column + i < row.size && place < kQueuedZ) s.queue[place++] = falling_bits(z[i]);
  }
  __syncthreads();

  // Radix
  const uint32_t queued = s.queued;
  uint32_t prefix = 0;
  selected.wanted = static_cast<uint32_t>(top);
  for (int digit = 0; digit < kDigits; ++digit) {
    const int low = 24 - 8 * digit;
    auto count = [&](uint32_t bits) {
      if (digit == 0 || bits >> (low + 8) == prefix) atomicAdd(&s.counts[digit * kBins + (bits >> low & 255)], 1u);
    };
    if (queued <= kQueuedZ) {
      for (uint32_t i = static_cast<uint32_t>(thread_of_row()); i < queued; i += kThreads) count(s.queue[i]);
    } else {
      for (int column = row.first; column < row.size; column += kStride) {
        float z[kQuad];
        load_quad(row.kept + column, z);
#pragma unroll
        for (int i = 0; i < kQuad; ++i)
          if (z[i] >= bound && column + i < row.size) count(falling_bits(z[i]));
      }
    }
    if (cluster_size() > 1)
      klflow_cluster_sync();
    else
      __syncthreads();
    const Bin bin = find_bin<true>(s.counts + digit * kBins, selected.wanted);
    prefix = prefix << 8 | bin.index;
    selected.wanted = bin.left;
    selected.equals = bin.count;
  }
  selected.last = value_of_bits(~prefix);
  return selected;
}

// Of the selected entries and of all others, relative to exp(shift).
struct Masses {
  double selected, rest;
};

// A contiguous piece of the slice for each thread: an odd number of quads, so that the threads of a warp read different
// banks. above, equal: how many of its z are above `last`, and equal to it.
struct Piece {
  int begin, end;
  uint32_t above, equal;
};

__device__ __forceinline__ Masses weigh_row(const KeptRow& row, const Selected& selected, float shift, Piece& piece) {
  const int length = kQuad * (((unhoisted(row.size) + kQuad - 1) / kQuad + kThreads - 1) / kThreads | 1);
  const int begin = length * thread_of_row();
  piece = {begin, begin + length < row.size ? begin + length : row.size, 0, 0};
  float above = 0.0f, rest = 0.0f;  // masses
#pragma unroll 1                    // registers
  for (int column = piece.begin; column < piece.end; column += kQuad) {
    float z[kQuad], mass[kQuad];
    load_quad(row.kept + column, z);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) mass[i] = mass_of(z[i], shift);
    if (fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) >= selected.last) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        if (z[i] > selected.last) {
          above += mass[i];
          ++piece.above;
        } else if (z[i] < selected.last) {
          rest += mass[i];
        } else if (column + i < row.size) {
          ++piece.equal;
        }
      }
    } else {
      rest += (mass[0] + mass[1]) + (mass[2] + mass[3]);
    }
  }
  const double last_mass = selected.equals > 0 ? mass_of(selected.last, shift) : 0.0;
  Masses masses = row_reduce(Masses{above, rest},
                             [](Masses a, Masses b) { return Masses{a.selected + b.selected, a.rest + b.rest}; });
  masses.selected += last_mass * selected.wanted;
  masses.rest += last_mass * (selected.equals - selected.wanted);
  return masses;
}

// Every selected entry to its place in ascending order of column, ties going to the lower column.
__device__ __forceinline__ void store_selected(const KeptRow& row, int first_column, const Selected& selected,
                                               const Piece& piece, float shift, double total, int32_t* ids, float* q) {
  const uint64_t before = row_prefix(static_cast<uint64_t>(piece.equal) << 32 | piece.above);
  uint32_t place = static_cast<uint32_t>(before), equals_before = static_cast<uint32_t>(before >> 32);
  place += equals_before < selected.wanted ? equals_before : selected.wanted;
  const float inverse = static_cast<float>(1.0 / total);
  for (int column = piece.begin; column < piece.end && piece.above + piece.equal > 0; column += kQuad) {
    float z[kQuad];
    load_quad(row.kept + column, z);
    if (!(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) >= selected.last)) continue;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (!(z[i] >= selected.last) || column + i >= row.size) continue;
      if (z[i] == selected.last && equals_before++ >= selected.wanted) continue;
      ids[place] = first_column + column + i;
      q[place++] = mass_of(z[i], shift) * inverse;
    }
  }
}

}  // namespace klflow::cuda
