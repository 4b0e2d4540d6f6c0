// KLFLOW_HD: before a function that the host and the kernels share. On the host it is always inlined: units of several
// instruction sets define it, and of copies that the linker may choose from, one would run where it cannot.
#pragma once

#if defined(__CUDACC__)
#define KLFLOW_HD __host__ __device__ __forceinline__
#else
#define KLFLOW_HD inline __attribute__((always_inline))
#endif
