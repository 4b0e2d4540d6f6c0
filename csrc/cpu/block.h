// Walking a row in blocks that stay in cache.
#pragma once

#include <cstdint>

#include "simd.h"

namespace klflow::KLFLOW_ISA {

constexpr int64_t kBlock = 2048;  // columns handled at a time: 8 KB of float32, in L1

// A float32 view of columns [begin, begin + n) of a row: the row itself, or its conversion in `buffer`.
KLFLOW_INLINE const float* block_of(const float* row, int64_t begin, int64_t, float*) { return row + begin; }
template <class T>
KLFLOW_INLINE const float* block_of(const T* row, int64_t begin, int64_t n, float* buffer) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(buffer + i, load(row + begin + i));
  if (i < n) store(buffer + i, load_tail(row + begin + i, static_cast<int>(n - i), 0.0f));
  return buffer;
}

// Calls f(offset, kLanes) on whole vectors, then f(offset, n) on the n columns that are left.
template <class F>
KLFLOW_INLINE void for_vectors(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, static_cast<int>(n - i));
}
template <class T>
KLFLOW_INLINE vf load_n(const T* p, int n, float fill) {
  return n == kLanes ? load(p) : load_tail(p, n, fill);
}
template <class T>
KLFLOW_INLINE void store_n(T* p, vf v, int n) {
  if (n == kLanes)
    store(p, v);
  else
    store_tail(p, v, n);
}

}  // namespace klflow::KLFLOW_ISA
