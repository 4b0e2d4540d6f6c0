// The Python module klflow_ext._C: loading it registers the operators of the files beside this one (read run.h first).
// It tells how the library was built. LibTorch's stable ABI is all that it needs of torch, so one build serves every
// torch from 2.11 on.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../common/philox.h"
#include "run.h"

#ifndef KLFLOW_CUDA_ARCHES
#define KLFLOW_CUDA_ARCHES ""
#endif
#ifndef KLFLOW_CUDA_REASON
#define KLFLOW_CUDA_REASON ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Registers torch.ops.klflow and tells how this library was built.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch_headers"] = KLFLOW_TORCH_VERSION;
    info["torch_minimum"] = "2.11";
    info["compiler"] = __VERSION__;
#ifdef KLFLOW_WITH_CUDA
    info["cuda"] = true;
    info["nvcc"] = KLFLOW_NVCC_VERSION;
#else
    info["cuda"] = false;
#endif
    info["cuda_arch"] = KLFLOW_CUDA_ARCHES;
#ifdef KLFLOW_WITH_CUDA
    info["cuda_stream"] = klflow::stream_source();
#else
    info["cuda_stream"] = "";
#endif
    info["cuda_reason"] = KLFLOW_CUDA_REASON;
    info["cpu_capability"] = klflow::cpu::capability();
    info["cpu_capability_reason"] = klflow::cpu::capability_reason();
    return info;
  });
  m.def(
      "use_backend",
      [](const std::optional<std::string>& path) {
        klflow::stand_in = nullptr;
        if (!path.has_value()) return;
        void* library = dlopen(path->c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) throw std::runtime_error(dlerror());
        const auto backend = reinterpret_cast<const klflow::Backend* (*)()>(dlsym(library, "klflow_backend"));
        if (backend == nullptr) throw std::runtime_error(*path + ": exports no klflow_backend");
        klflow::stand_in = backend();
      },
      "For tests: a shared library whose kernels run on CPU tensors in place of the CPU kernels; None ends it.",
      pybind11::arg("path"));
  m.def(
      "philox",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const klflow::Words4 words = klflow::philox(c0, c1, c2, c3, k0, k1);
        return pybind11::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
      },
      "The four Philox4x32-10 words of a counter and a key.", pybind11::arg("c0"), pybind11::arg("c1"),
      pybind11::arg("c2"), pybind11::arg("c3"), pybind11::arg("k0"), pybind11::arg("k1"));
}
