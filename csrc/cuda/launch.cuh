// How every kernel is launched: a cluster of blocks per row, clusters striding over the rows, all shared memory
// dynamic, its layout chosen by what the device has.
#pragma once

#include <algorithm>

#include "row.cuh"
#include "runtime.h"

namespace klflow::cuda {

struct Layout {
  unsigned
      cluster;   // blocks to a row: of V, the dtype and the device alone, so that a row has the same bits in any batch
  int64_t keep;  // bytes of a block's kept slice, 0 where even the slices are too long: they are read (made) again
};

// Where `element` bytes of each of a row's V columns are kept between its passes, after `fixed` bytes of shared memory;
// `most`: the largest cluster, <= 8. Clusters grow until two blocks share a multiprocessor.
inline Layout layout_of(int64_t vocab, int64_t element, int64_t fixed = kPartialBytes, unsigned most = 8) {
  constexpr int64_t kReserved = 1024;  // of each block, for the system
  const Device d = device();
  const int64_t vectors = (vocab + kVector - 1) / kVector, half = d.processor_bytes / 2 - kReserved - fixed;
  auto bytes = [&](unsigned cluster) { return (vectors + cluster - 1) / cluster * kVector * element; };
  unsigned cluster = 1;
  while (d.clusters && cluster < most && bytes(cluster) > half) cluster *= 2;
  return {cluster, bytes(cluster) <= d.block_bytes - fixed ? bytes(cluster) : 0};
}

// The most clusters of a grid; few on the host machine, whose tests then see blocks go on to further rows.
#if defined(KLFLOW_SIMT)
constexpr int64_t kMostClusters = 2;
#else
constexpr int64_t kMostClusters = 1 << 27;
#endif

// A grid that strides over `items` (rows, tokens), a cluster of blocks for each; shared: bytes of a block.
template <class Params>
const char* launch(const char* name, void (*kernel)(Params, bool), const Params& params, bool flag, int64_t items,
                   unsigned cluster_size, size_t shared, void* stream) {
  if (items == 0) return nullptr;
  const unsigned blocks = static_cast<unsigned>(std::min(items, kMostClusters)) * cluster_size;
#if defined(KLFLOW_SIMT)
  return simt::launch(name, [&] { kernel(params, flag); }, blocks, kThreads, shared, cluster_size);
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared > 48 << 10) error = allow_shared_memory(function, device().block_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = cluster_size;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = cluster_size > 1 ? 1 : 0;
    void* arguments[] = {const_cast<Params*>(&params), &flag};
    error = cudaLaunchKernelExC(&config, function, arguments);
  }
  return error == cudaSuccess ? nullptr : text_of(error);
#endif
}

// fixed: bytes of shared memory before the kept slice.
template <class Params>
const char* launch_rows(const char* name, void (*kernel)(Params, bool), const Params& params, int64_t rows,
                        Layout layout, void* stream, int64_t fixed = kPartialBytes) {
  return launch(name, kernel, params, layout.keep > 0, rows, layout.cluster, fixed + layout.keep, stream);
}

// f(T{}) with the C++ type of a dtype.
template <class F>
const char* for_dtype(int32_t dtype, F&& f) {
  if (dtype == kFloat32) return f(float{});
  if (dtype == kBFloat16) return f(__nv_bfloat16{});
  return f(__half{});
}

}  // namespace klflow::cuda
