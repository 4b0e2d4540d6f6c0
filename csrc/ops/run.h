// How an operator is registered and run: KLFLOW_OPERATOR gives torch its schema and its function, KLFLOW_RUN calls the
// kernels of the tensors' device.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/dispatch.h"
#include "../cuda/ops.h"
#include "check.h"
#ifdef KLFLOW_WITH_CUDA
#include "../cuda/torch_stream.h"
#endif

namespace klflow {

// Registers torch.ops.klflow.op: schema is its arguments and results, the function has the same name.
#define KLFLOW_CPU_OPERATOR(op, schema)                           \
  STABLE_TORCH_LIBRARY_FRAGMENT(klflow, m) { m.def(#op schema); } \
  STABLE_TORCH_LIBRARY_IMPL(klflow, CPU, m) { m.impl(#op, TORCH_BOX(&op)); }
#ifdef KLFLOW_WITH_CUDA
#define KLFLOW_OPERATOR(op, schema) \
  KLFLOW_CPU_OPERATOR(op, schema)   \
  STABLE_TORCH_LIBRARY_IMPL(klflow, CUDA, m) { m.impl(#op, TORCH_BOX(&op)); }
#else
#define KLFLOW_OPERATOR KLFLOW_CPU_OPERATOR
#endif

// Stands in for the CPU kernels where set: see use_backend in module.cpp.
inline const Backend* stand_in = nullptr;

inline void check_error(const char* error) { check(error == nullptr, error == nullptr ? "" : error); }

#ifdef KLFLOW_WITH_CUDA
// f(stream) with the tensor's device as the current one: the stable ABI sets none.
template <class F>
void on_device_of(const Tensor& like, F&& f) {
  with_current_device<torch::stable::accelerator::DeviceGuard>(like.get_device(), &torch_stream, f);
}
#define KLFLOW_RUN_CUDA(op, params, like) \
  on_device_of(like, [&](void* stream) { check_error(cuda::op(params, stream)); })
#else
#define KLFLOW_RUN_CUDA(op, params, like) check(false, "klflow_ext was built without CUDA")
#endif
#define KLFLOW_RUN(op, params, like)                                  \
  ((like).is_cuda()      ? KLFLOW_RUN_CUDA(op, params, like)          \
   : stand_in != nullptr ? check_error(stand_in->op(params, nullptr)) \
                         : cpu::op(params))

// First touches of a fresh CPU tensor cost several times the arithmetic on it with small pages.
inline void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (!t.is_cpu() || !t.is_contiguous()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace klflow
