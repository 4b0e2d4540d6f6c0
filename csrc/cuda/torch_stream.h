// torch's current CUDA stream, and the current device around a launch, without linking torch's CUDA library.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Null where torch has no CUDA, or where the library was linked so that the loader does not look into torch's.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace klflow {

using StreamFunction = int32_t (*)(int32_t device_index, void** stream);

// The function and where it was found: bound by the loader, or looked up in torch's CUDA library, which `import torch`
// has loaded.
struct FoundStream {
  StreamFunction function;
  const char* source;  // "" where there is none
};
inline const FoundStream& find_stream() {
  static const FoundStream found = [] {
    if (aoti_torch_get_current_cuda_stream != nullptr)
      return FoundStream{&aoti_torch_get_current_cuda_stream, "bound by the loader"};
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return FoundStream{reinterpret_cast<StreamFunction>(symbol), symbol == nullptr ? "" : "found in libtorch_cuda.so"};
  }();
  return found;
}
inline const char* stream_source() { return find_stream().source; }

inline void* torch_stream(int32_t device) {
  if (find_stream().function == nullptr)
    throw std::runtime_error("this torch has no CUDA: klflow_ext finds no aoti_torch_get_current_cuda_stream in it");
  void* stream = nullptr;
  if (find_stream().function(device, &stream) != 0)
    throw std::runtime_error("torch gives no current CUDA stream of device " + std::to_string(device));
  return stream;
}

// f(the device's current stream), the device being the current one until f returns or throws. Guard(device) sets it and
// its destructor restores it.
template <class Guard, class Stream, class F>
void with_current_device(int32_t device, Stream&& stream_of, F&& f) {
  const Guard guard(device);
  f(stream_of(device));
}

}  // namespace klflow
