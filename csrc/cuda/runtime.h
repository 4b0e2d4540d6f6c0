// What a launch asks of the CUDA runtime: the current device's limits, shared memory for a kernel, and error texts that
// say what to do.
#pragma once

#include <cstdint>

#if defined(KLFLOW_SIMT)
#include "../simt/simt.h"
#else
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <string>
#include <utility>
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

// The text of an error; of those that tell of a wrong build, also what was built and what is here.
inline const char* text_of(cudaError_t error) {
  const bool driver_is_old = error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion;
  if (error != cudaErrorNoKernelImageForDevice && !driver_is_old) return cudaGetErrorString(error);
  thread_local std::string text;
  int index = 0, major = 0, minor = 0, driver = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  cudaDriverGetVersion(&driver);
  auto version = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
  text = std::string(cudaGetErrorString(error)) + ": klflow_ext was built for " KLFLOW_CUDA_ARCHES " by CUDA " +
         version(CUDART_VERSION) + "; ";
  if (driver_is_old)
    text += "the driver is of CUDA " + version(driver) + ": update it, or build with an older nvcc";
  else
    text += "device " + std::to_string(index) + " has compute capability " + std::to_string(major) + "." +
            std::to_string(minor) + ": build with it in TORCH_CUDA_ARCH_LIST, from 8.0 on";
  return text.c_str();
}

// Lets a kernel have all the shared memory that the device gives to a block; once for each kernel and device.
inline cudaError_t allow_shared_memory(const void* kernel, int64_t bytes) {
  static std::mutex lock;
  static std::set<std::pair<const void*, int> > done;
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

}  // namespace klflow::cuda
