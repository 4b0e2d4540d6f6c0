// How every kernel is launched: a cluster of blocks per row, clusters striding over the rows, all shared memory
// dynamic, its layout chosen by what the device has.
#pragma once

#include <algorithm>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "row.cuh"
#if !defined(KLFLOW_SIMT)
#include <cuda_runtime.h>
#endif

namespace klflow::cuda {

// What a layout depends on, of the current device.
struct Device {
  bool clusters;            // thread-block clusters: from compute capability 9.0 on
  int64_t block_bytes;      // shared memory that a block may have
  int64_t processor_bytes;  // shared memory of a multiprocessor
  int64_t processors;
};

#if defined(KLFLOW_SIMT)
inline Device device() {
  const simt::DeviceKind& kind = simt::device_kind();
  return {kind.clusters, kind.block_bytes, kind.processor_bytes, 1};
}
#else
inline Device device() {  // asked once for each
  constexpr int kMost = 64;
  static std::mutex lock;
  static Device known[kMost] = {};
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index >= kMost) index = 0;  // the launch then says what is wrong
  const std::lock_guard<std::mutex> guard(lock);
  Device& found = known[index];
  if (found.processors == 0) {
    auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      cudaDeviceGetAttribute(&value, attribute, index);
      return value;
    };
    found = {ask(cudaDevAttrComputeCapabilityMajor) >= 9, ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
             ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor), ask(cudaDevAttrMultiProcessorCount)};
  }
  return found;
}
#endif

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

#if !defined(KLFLOW_SIMT)
// The text of an error; of those that tell of a wrong build, also what was built and what is here.
inline const char* text_of(cudaError_t error) {
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInsufficientDriver)
    return cudaGetErrorString(error);
  thread_local std::string text;
  int index = 0, major = 0, minor = 0, driver = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  cudaDriverGetVersion(&driver);
  auto version = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
  text = std::string(cudaGetErrorString(error)) + ": klflow_ext was built for " KLFLOW_CUDA_ARCHES " by CUDA " +
         version(CUDART_VERSION) + "; ";
  if (error == cudaErrorInsufficientDriver)
    text += "the driver is of CUDA " + version(driver) + ": update it, or build with an older nvcc";
  else
    text += "device " + std::to_string(index) + " has compute capability " + std::to_string(major) + "." +
            std::to_string(minor) + ": build with it in TORCH_CUDA_ARCH_LIST";
  return text.c_str();
}

// Lets a kernel have all the shared memory that the device gives to a block; once for each kernel and device.
inline cudaError_t allow_shared_memory(const void* kernel, int64_t bytes) {
  static std::mutex lock;
  static std::set<std::pair<const void*, int>> done;
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const std::lock_guard<std::mutex> guard(lock);
  if (error != cudaSuccess || done.count({kernel, index}) > 0) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) done.insert({kernel, index});
  return error;
}
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
