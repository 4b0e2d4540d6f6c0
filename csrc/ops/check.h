// What the operators check of their tensors, and what they read from them: pointers, strides and scalars for the
// structs of common/params.h. Every message names the argument. Friendlier checks of users' arguments (types, ranges,
// broadcasting) are in klflow_ext/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../common/geodesic.h"
#include "../common/params.h"

namespace klflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string device_of(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() ? b.is_cpu() : a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}
inline const Tensor* present(const Tensor& t) { return &t; }
inline const Tensor* present(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

// Throws unless all the tensors, of which optional ones may be absent, are on the device of the first.
#define KLFLOW_CHECK_DEVICES(...) check_devices(#__VA_ARGS__, __VA_ARGS__)
template <class... Others>
void check_devices(const char* names, const Tensor& first, const Others&... others) {
  int place = 0, bad = 0;
  const Tensor* wrong = nullptr;
  auto visit = [&](const Tensor* tensor) {
    ++place;
    if (wrong == nullptr && tensor != nullptr && !same_device(first, *tensor)) wrong = tensor, bad = place;
  };
  (visit(present(others)), ...);
  if (wrong == nullptr) return;
  std::istringstream list(names);
  std::string first_name, name;
  std::getline(list, first_name, ',');
  for (int i = 0; i < bad; ++i) std::getline(list >> std::ws, name, ',');
  check(false, name, ": got a tensor on ", device_of(*wrong), ", allowed is the device of ", first_name, ", ",
        device_of(first));
}

inline int32_t dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: check(false, name, ": dtype must be float32, bfloat16 or float16"); return -1;
  }
}

inline Rows rows_of(const Tensor& t, int64_t rows, int64_t vocab, const char* name) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == vocab, name, ": shape must be (", rows, ", ", vocab, ")");
  check(t.stride(1) == 1 || vocab == 1 || rows == 0, name, ": the last axis must have stride 1");
  return {t.data_ptr(), t.stride(0), dtype_of(t, name), 0};
}

inline Tokens tokens_of(const Tensor& t, int64_t rows, const char* name) {
  check(t.dim() == 1 && t.size(0) == rows, name, ": shape must be (", rows, ",)");
  const bool int32 = t.scalar_type() == ScalarType::Int;
  check(int32 || t.scalar_type() == ScalarType::Long, name, ": dtype must be int64 or int32");
  return {t.data_ptr(), t.stride(0), int32, 0};
}

inline Scalars scalars_of(const Tensor& t, int64_t rows, const char* name) {
  check(t.dim() == 1 && t.size(0) == rows, name, ": shape must be (", rows, ",)");
  check(t.scalar_type() == ScalarType::Float, name, ": dtype must be float32");
  return {static_cast<const float*>(t.data_ptr()), t.stride(0)};
}
inline Scalars scalars_of(const OptionalTensor& t, int64_t rows, const char* name) {
  return t.has_value() ? scalars_of(*t, rows, name) : Scalars{nullptr, 0};
}

inline float* vector_of(const Tensor& t, int64_t rows, const char* name) {
  scalars_of(t, rows, name);
  check(t.is_contiguous(), name, ": must be contiguous");
  return static_cast<float*>(t.data_ptr());
}

inline int64_t* token_vector_of(const Tensor& t, int64_t rows, const char* name) {
  check(tokens_of(t, rows, name).is_int32 == 0 && t.is_contiguous(), name, ": must be contiguous int64");
  return static_cast<int64_t*>(t.data_ptr());
}

template <class T>
T* matrix_of(const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype, const char* name) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype && t.is_contiguous(),
        name, ": must be contiguous of shape (", rows, ", ", columns, ") and the declared dtype");
  return static_cast<T*>(t.data_ptr());
}

inline const float* log_prior_of(const Tensor& t, int64_t vocab) { return vector_of(t, vocab, "log_prior"); }

inline Rng rng_of(const Tensor& t, int64_t rows, int64_t row_offset) {
  check(t.scalar_type() == ScalarType::Long && t.is_contiguous(), "rng: must be contiguous int64");
  const bool shared = t.dim() == 1 && t.size(0) == 2;
  check(shared || (t.dim() == 2 && t.size(0) == rows && (t.size(1) == 2 || t.size(1) == 3)),
        "rng: shape must be (2,), (", rows, ", 2) or (", rows, ", 3)");
  return {static_cast<const int64_t*>(t.data_ptr()), shared ? 0 : t.size(1), row_offset};
}

inline Given given_of(const OptionalTensor& flags, const OptionalTensor& known, int64_t rows) {
  Given given{};
  if (!flags.has_value()) return given;
  check(flags->dim() == 1 && flags->size(0) == rows && flags->scalar_type() == ScalarType::Bool,
        "given: must be bool of shape (", rows, ",)");
  given.flags = static_cast<const uint8_t*>(flags->data_ptr());
  given.stride = flags->stride(0);
  if (known.has_value()) given.known = tokens_of(*known, rows, "known");
  return given;
}

inline float checked_gap(double beta, int64_t vocab) {
  check(beta > 0.0 && beta < 1.0, "beta: ", beta, " is not in (0, 1)");
  return gap_of(beta, vocab);
}

// On the CPU a bad target is an error before any work (Python's IndexError); on CUDA a check would synchronise, so the
// kernel answers NaN.
inline void check_targets(const Tokens& target, int64_t rows, int64_t vocab, const char* name, const Given* only,
                          const int64_t* ignore_index) {
  for (int64_t row = 0; row < rows; ++row) {
    if (only != nullptr && !only->at(row)) continue;
    const int64_t value = target.at(row);
    if ((value >= 0 && value < vocab) || (ignore_index != nullptr && value == *ignore_index)) continue;
    std::ostringstream message;
    message << name << ": row " << row << " holds " << value << ", allowed is 0 to V - 1 = " << vocab - 1;
    if (ignore_index != nullptr) message << " or ignore_index = " << *ignore_index;
    throw std::out_of_range(message.str());
  }
}

}  // namespace klflow
