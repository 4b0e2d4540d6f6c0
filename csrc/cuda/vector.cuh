// Element and vector access to rows of three dtypes, 16 bytes at a time at any alignment.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/params.h"
#include "block.cuh"

namespace klflow::cuda {

// Rows of float32, bfloat16 or float16; the dtype is uniform over the grid
__device__ __forceinline__ float load(const Rows& rows, int64_t row, int64_t column) {
  const int64_t i = row * rows.stride + column;
  if (rows.dtype == kFloat32) return static_cast<const float*>(rows.data)[i];
  if (rows.dtype == kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(rows.data)[i]);
  return __half2float(static_cast<const __half*>(rows.data)[i]);
}
__device__ __forceinline__ void store(const Rows& rows, int64_t row, int64_t column, float x) {
  const int64_t i = row * rows.stride + column;
  if (rows.dtype == kFloat32)
    static_cast<float*>(rows.data)[i] = x;
  else if (rows.dtype == kBFloat16)
    static_cast<__nv_bfloat16*>(rows.data)[i] = __float2bfloat16_rn(x);
  else
    static_cast<__half*>(rows.data)[i] = __float2half_rn(x);
}

// Vectors of 8 columns (numbered by int: V < 2^31), read and written 16 bytes at a time whatever the row's
// alignment
constexpr int kVector = 8;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
struct alignas(16) Vector {
  T element[kVector];
};
// The same as the 16-byte words that are read and written.
template <class T>
union VectorWords {
  Vector<T> vector;
  Words16 part[sizeof(Vector<T>) / 16];
  __device__ __forceinline__ VectorWords() {}
};
template <class T>
__device__ __forceinline__ Vector<T> load_aligned(const T* address) {
  VectorWords<T> x;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
    x.part[i] = load16(reinterpret_cast<const Words16*>(address) + i);
  return x.vector;
}
template <class T>
__device__ __forceinline__ void store_aligned(T* address, const Vector<T>& vector) {
  VectorWords<T> x;
  x.vector = vector;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
    store16(reinterpret_cast<Words16*>(address) + i, x.part[i]);
}

// The elements of a 16-byte unit of memory, and how many of them lie between the boundary at or before a row and the
// row.
template <class T>
constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
template <class T>
__device__ __forceinline__ int past_boundary(const T* row) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
}

// The first column on such a boundary.
template <class T>
__device__ __forceinline__ int first_vector(const T* row) {
  return -past_boundary(row) & (kUnit<T> - 1);
}

// f(Constant<value>{}) for a value in [first, last], so that what depends on it is worked out by the compiler.
template <int n>
struct Constant {
  static constexpr int value = n;
};
template <int first, int last, class F>
__device__ __forceinline__ void with_constant(int value, F&& f) {
  if constexpr (first == last) {
    f(Constant<first>{});
  } else {
    if (value == first)
      f(Constant<first>{});
    else
      with_constant<first + 1, last>(value, f);
  }
}

// An element of a 32-bit word as float: of two 16-bit ones the lower or the upper.
template <class T>
__device__ __forceinline__ float float_of(uint32_t word, bool upper);
template <>
__device__ __forceinline__ float float_of<float>(uint32_t word, bool) {
  return __int_as_float(static_cast<int32_t>(word));
}
template <>
__device__ __forceinline__ float float_of<__nv_bfloat16>(uint32_t word, bool upper) {
  return __int_as_float(static_cast<int32_t>(upper ? word & 0xffff0000u : word << 16));
}
template <>
__device__ __forceinline__ float float_of<__half>(uint32_t word, bool upper) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(upper ? word >> 16 : word)));
}

template <class T>
__device__ __forceinline__ float element_of(const Words16& unit, int i) {
  const int word = i * static_cast<int>(sizeof(T)) / 4;
  return float_of<T>(unit.w[word], i % 2 != 0);
}

// A vector whose first element lies `past` elements past a 16-byte boundary, as the aligned units that hold it. past is
// the same for all vectors of a row, so a loop for each value of it reads unaligned rows without shifting anything.
template <class T, int past>
struct Window {
  static constexpr int kParts = static_cast<int>(sizeof(Vector<T>)) / 16, kUnits = kParts + (past > 0);
  Words16 unit[kUnits];

  __device__ __forceinline__ explicit Window(const T* first) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) unit[i] = load16(reinterpret_cast<const Words16*>(first - past) + i);
  }
  __device__ __forceinline__ float at(int i) const {
    return element_of<T>(unit[(past + i) / kUnit<T>], (past + i) % kUnit<T>);
  }
};

// Columns [column, column + 8) of a row; those outside [0, vocab) are fill. An unaligned vector inside the row is two
// (float32: three) aligned loads and a shift, so a thread's columns, and the order of every sum, depend on the column
// index alone. Nothing outside the row is touched.
template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* row, int column, int vocab, T fill) {
  constexpr int kParts = sizeof(Vector<T>) / 16;
  const T* address = row + column;
  const uint32_t shift = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) & 15);
  if (shift == 0 && column >= 0 && column + kVector <= vocab) return load_aligned(address);
  const int before = static_cast<int>(shift / sizeof(T)), window = (kParts + 1) * 16 / static_cast<int>(sizeof(T));
  if (column - before >= 0 && column - before + window <= vocab) {
    const Words16* aligned = reinterpret_cast<const Words16*>(address - before);
    uint32_t w[4 * (kParts + 1)];
#pragma unroll
    for (int part = 0; part <= kParts; ++part) {
      const Words16 words = load16(aligned + part);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[4 * part + i] = words.w[i];
    }
#pragma unroll
    for (int i = 0; i < 4 * kParts + 2; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 4 * kParts + 1; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
    VectorWords<T> result;
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i)
      result.part[i / 4].w[i % 4] = sizeof(T) == 4 ? w[i] : __funnelshift_r(w[i], w[i + 1], (shift & 2) * 8);
    return result.vector;
  }
  Vector<T> result;
#pragma unroll
  for (int i = 0; i < kVector; ++i) result.element[i] = column + i >= 0 && column + i < vocab ? address[i] : fill;
  return result;
}

// Writes a whole row, values(column, v) giving the 8 floats from `column` on (it may begin before 0 or end after V): 16
// bytes at a time inside the row, single elements at its two ends.
template <class T, class Values>
__device__ __forceinline__ void store_row(T* row, int vocab, Values&& values) {
  const int past = static_cast<int>((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  for (int column = kVector * static_cast<int>(threadIdx.x) - past; column < vocab; column += kVector * kThreads) {
    float v[kVector];
    values(column, v);
    Vector<T> result;
#pragma unroll
    for (int i = 0; i < kVector; ++i) result.element[i] = from_float<T>(v[i]);
    if (column >= 0 && column + kVector <= vocab) {
      VectorWords<T> words;
      words.vector = result;
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i)
        store16_global(reinterpret_cast<Words16*>(row + column) + i, words.part[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (column + i >= 0 && column + i < vocab) row[column + i] = result.element[i];
    }
  }
}

// The vectors of a row that Window reads at any alignment without leaving it: whole ones from column 8 to `end`. The
// few columns outside (at most 23) are one each of the first threads; so which thread has a column, and in what order,
// depends on the column alone.
struct Interior {
  int end, single;  // single: this thread's other column, -1: none
  __device__ __forceinline__ explicit Interior(int size) {
    end = size >= 3 * kVector ? (size & ~(kVector - 1)) - kVector : kVector;
    const int thread = static_cast<int>(threadIdx.x), column = thread < kVector ? thread : end + thread - kVector;
    single = thread < 32 && column < size ? column : -1;
  }
};
// f(column, Window) for this thread's vectors of the interior.
template <class T, class F>
__device__ __forceinline__ void read_interior(const T* row, const Interior& interior, F&& f) {
  with_constant<0, kUnit<T> - 1>(past_boundary(row), [&](auto past) {
    for (int column = kVector * (static_cast<int>(threadIdx.x) + 1); column < interior.end;
         column += kVector * kThreads)
      f(column, Window<T, decltype(past)::value>(row + column));
  });
}

// A row kept in shared memory as it lies in global memory, past_boundary(row) elements past a boundary too: its
// windows' units are copied as they are, by store_image_if, and the rest by store_image_ends.
template <class T, int past>
__device__ __forceinline__ void store_image_if(bool keep, SharedAddress kept, int column,
                                               const Window<T, past>& window) {
#pragma unroll
  for (int i = 0; i < window.kParts; ++i)
    store16_shared_if(keep, kept + (column - past) * static_cast<int>(sizeof(T)) + 16 * i, window.unit[i]);
}
template <class T>
__device__ __forceinline__ void store_image_ends(T* kept, const T* row, int size, const Interior& interior) {
  const int past = past_boundary(row), thread = static_cast<int>(threadIdx.x), before = kVector - past;
  const int column = thread < before ? thread : interior.end - past + thread - before;
  if (thread < 32 && column < size) kept[column] = row[column];
}

// Reads a row in any order of its columns: unit(column, words) gets its aligned units of 16 bytes, single(column) one
// of the few columns at its ends.
template <class T, class ReadUnit, class ReadSingle>
__device__ __forceinline__ void read_units(const T* row, int size, ReadUnit&& unit, ReadSingle&& single) {
  const int thread = static_cast<int>(threadIdx.x), before = first_vector(row);
  int column = before + kUnit<T> * thread;
#pragma unroll 4
  for (; column + kUnit<T> <= size; column += kUnit<T> * kThreads)
    unit(column, load16(reinterpret_cast<const Words16*>(row + column)));
  const int after = size > before ? size - (size - before) % kUnit<T> : size;
  column = thread < before ? thread : after + thread - before;
  if (thread < 2 * kUnit<T> && column < size) single(column);
}

// The larger numbers of two words, NaN where one is that.
template <class T>
__device__ __forceinline__ uint32_t max_words(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4)
    return __float_as_uint(max_nan(float_of<float>(a, false), float_of<float>(b, false)));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return max_bf16x2(a, b);
  else
    return max_f16x2(a, b);
}
template <class T>
__device__ __forceinline__ uint32_t max_words(const Words16& unit) {
  return max_words<T>(max_words<T>(unit.w[0], unit.w[1]), max_words<T>(unit.w[2], unit.w[3]));
}
// -infinity in all of a word.
template <class T>
__device__ __forceinline__ uint32_t lowest_word() {
  if constexpr (sizeof(T) == 4)
    return 0xff800000u;
  else
    return std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u : 0xfc00fc00u;
}
// The larger of the numbers of a word.
template <class T>
__device__ __forceinline__ float max_of_word(uint32_t word) {
  return max_nan(float_of<T>(word, false), float_of<T>(word, true));
}

// Writes a row. write_vectors: vector(column, v) gives 8 columns that lie in it; write_ends: single(column) gives one
// of the few at its ends.
template <class T, class MakeVector>
__device__ __forceinline__ void write_vectors(T* row, int size, MakeVector&& vector) {
  const int end = size - kVector + 1;
  int column = first_vector(row) + kVector * static_cast<int>(threadIdx.x);
  Words16* address = reinterpret_cast<Words16*>(row + column);
#pragma unroll 2
  for (; column < end; column += kVector * kThreads) {
    float v[kVector];
    vector(column, v);
    VectorWords<T> words;
#pragma unroll
    for (int i = 0; i < kVector; ++i) words.vector.element[i] = from_float<T>(v[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Vector<T>) / 16); ++i) store16_global(address + i, words.part[i]);
    address += kThreads * sizeof(Vector<T>) / 16;
  }
}
template <class T, class MakeSingle>
__device__ __forceinline__ void write_ends(T* row, int size, MakeSingle&& single) {
  const int thread = static_cast<int>(threadIdx.x), before = first_vector(row);
  const int after = size > before ? size - (size - before) % kVector : size;
  const int column = thread < before ? thread : after + thread - before;
  if (thread < 2 * kVector && column < size) row[column] = from_float<T>(single(column));
}
template <class T, class MakeVector, class MakeSingle>
__device__ __forceinline__ void write_row(T* row, int size, MakeVector&& vector, MakeSingle&& single) {
  write_vectors(row, size, vector);
  write_ends(row, size, single);
}

// A vector of a float32 row kept in shared memory, at its column index.
__device__ __forceinline__ void store_kept(float* kept, int column, const float (&values)[kVector]) {
  Vector<float> vector;
#pragma unroll
  for (int i = 0; i < kVector; ++i) vector.element[i] = values[i];
  store_aligned(kept + column, vector);
}
__device__ __forceinline__ void load_kept(const float* kept, int column, int vocab, float (&values)[kVector]) {
  const Vector<float> vector = load_vector<float>(kept, column, vocab, 0.0f);
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = vector.element[i];
}

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

}  // namespace klflow::cuda
