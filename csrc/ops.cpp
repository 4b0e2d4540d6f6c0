// The torch operators klflow::*, from schema to backend: read this first. Each function below checks its tensors, fills
// the plain struct of common/params.h and calls cpu::<op> or cuda::<op>. The library is built on LibTorch's stable ABI,
// so one build serves every torch >= 2.11; friendlier argument checks (types, ranges, broadcasting) are in
// klflow_ext/ops.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/geodesic.h"
#include "common/params.h"
#include "common/philox.h"
#include "cpu/dispatch.h"
#include "cuda/ops.h"
#ifdef KLFLOW_WITH_CUDA
#include "cuda/torch_stream.h"
#endif

namespace klflow {
namespace {

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

int32_t dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: check(false, name, ": dtype must be float32, bfloat16 or float16"); return -1;
  }
}

Rows rows_of(const Tensor& t, int64_t rows, int64_t vocab, const char* name) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == vocab, name, ": shape must be (", rows, ", ", vocab, ")");
  check(t.stride(1) == 1 || vocab == 1 || rows == 0, name, ": the last axis must have stride 1");
  return {t.data_ptr(), t.stride(0), dtype_of(t, name), 0};
}

Tokens tokens_of(const Tensor& t, int64_t rows, const char* name) {
  check(t.dim() == 1 && t.size(0) == rows, name, ": shape must be (", rows, ",)");
  const bool int32 = t.scalar_type() == ScalarType::Int;
  check(int32 || t.scalar_type() == ScalarType::Long, name, ": dtype must be int64 or int32");
  return {t.data_ptr(), t.stride(0), int32, 0};
}

Scalars scalars_of(const Tensor& t, int64_t rows, const char* name) {
  check(t.dim() == 1 && t.size(0) == rows, name, ": shape must be (", rows, ",)");
  check(t.scalar_type() == ScalarType::Float, name, ": dtype must be float32");
  return {static_cast<const float*>(t.data_ptr()), t.stride(0)};
}
Scalars scalars_of(const OptionalTensor& t, int64_t rows, const char* name) {
  return t.has_value() ? scalars_of(*t, rows, name) : Scalars{nullptr, 0};
}

float* vector_of(const Tensor& t, int64_t rows, const char* name) {
  scalars_of(t, rows, name);
  check(t.is_contiguous(), name, ": must be contiguous");
  return static_cast<float*>(t.data_ptr());
}

int64_t* token_vector_of(const Tensor& t, int64_t rows, const char* name) {
  check(tokens_of(t, rows, name).is_int32 == 0 && t.is_contiguous(), name, ": must be contiguous int64");
  return static_cast<int64_t*>(t.data_ptr());
}

Rng rng_of(const Tensor& t, int64_t rows, int64_t row_offset) {
  check(t.scalar_type() == ScalarType::Long && t.is_contiguous(), "rng: must be contiguous int64");
  const bool shared = t.dim() == 1 && t.size(0) == 2;
  check(shared || (t.dim() == 2 && t.size(0) == rows && (t.size(1) == 2 || t.size(1) == 3)),
        "rng: shape must be (2,), (", rows, ", 2) or (", rows, ", 3)");
  return {static_cast<const int64_t*>(t.data_ptr()), shared ? 0 : t.size(1), row_offset};
}

Given given_of(const OptionalTensor& flags, const OptionalTensor& known, int64_t rows) {
  Given given{};
  if (!flags.has_value()) return given;
  check(flags->dim() == 1 && flags->size(0) == rows && flags->scalar_type() == ScalarType::Bool,
        "given: must be bool of shape (", rows, ",)");
  given.flags = static_cast<const uint8_t*>(flags->data_ptr());
  given.stride = flags->stride(0);
  if (known.has_value()) given.known = tokens_of(*known, rows, "known");
  return given;
}

float checked_gap(double beta, int64_t vocab) {
  check(beta > 0.0 && beta < 1.0, "beta: ", beta, " is not in (0, 1)");
  return gap_of(beta, vocab);
}

// On the CPU a bad target is an error before any work (Python's IndexError); on CUDA a check would synchronise, so the
// kernel answers NaN.
void check_targets(const Tokens& target, int64_t rows, int64_t vocab, const char* name, const Given* only,
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

// Stands in for the CPU kernels where set: see use_backend in the module below.
const Backend* stand_in = nullptr;

void check_error(const char* error) { check(error == nullptr, error == nullptr ? "" : error); }

// What posterior needs beside its arguments: see PosteriorParams::scratch.
Tensor posterior_scratch(PosteriorParams& p, const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t size = rows * columns;
  Tensor scratch = torch::stable::new_empty(like, {&size, 1}, ScalarType::Float);
  if (size > 0) p.scratch = static_cast<float*>(scratch.data_ptr());
  return scratch;
}

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

void run_posterior(PosteriorParams& p, const Tensor& like) {
  if (p.rows == 0) return;
  Tensor scratch;  // until the kernel has been launched
#ifdef KLFLOW_WITH_CUDA
  if (like.is_cuda())
    on_device_of(like, [&](void*) {
      scratch = posterior_scratch(p, like, cuda::posterior_scratch_rows(p), cuda::posterior_scratch_columns(p));
    });
#endif
  if (!like.is_cuda() && stand_in != nullptr && stand_in->posterior_scratch_rows != nullptr)
    scratch = posterior_scratch(p, like, stand_in->posterior_scratch_rows(p), stand_in->posterior_scratch_columns(p));
  KLFLOW_RUN(posterior, p, like);
}

// First touches of a fresh CPU tensor cost several times the arithmetic on it with small pages.
void prefer_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (!t.is_cpu() || !t.is_contiguous()) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr()), end = begin + t.numel() * t.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// ---- the operators

void noise_interpolate(Tensor target, Tensor t, Tensor rng, OptionalTensor given, double beta, int64_t row_offset,
                       bool log, Tensor out) {
  check(out.dim() == 2, "out: must have two axes");
  const int64_t rows = out.size(0), vocab = out.size(1);
  NoiseInterpolateParams p{};
  p.rows = rows;
  p.vocab = vocab;
  p.target = tokens_of(target, rows, "target");
  p.t = scalars_of(t, rows, "t");
  p.rng = rng_of(rng, rows, row_offset);
  p.given = given_of(given, std::nullopt, rows);
  p.c = checked_gap(beta, vocab);
  p.log = log;
  p.out = rows_of(out, rows, vocab, "out");
  if (rows == 0) return;
  if (out.is_cpu()) check_targets(p.target, rows, vocab, "target", nullptr, nullptr);
  KLFLOW_RUN(noise_interpolate, p, out);
}

void logit_interpolate_out(Tensor log_x0, Tensor log_x1, Tensor t, double beta, bool log, Tensor out) {
  check(log_x0.dim() == 2, "log_x0: must have two axes");
  const int64_t rows = log_x0.size(0), vocab = log_x0.size(1);
  LogitInterpolateParams p{};
  p.rows = rows;
  p.vocab = vocab;
  p.log_x0 = rows_of(log_x0, rows, vocab, "log_x0");
  if (log_x1.dim() == 2) {
    p.log_x1 = rows_of(log_x1, rows, vocab, "log_x1");
    check(p.log_x1.dtype == p.log_x0.dtype, "log_x1: must have the dtype of log_x0");
  } else {
    p.target = tokens_of(log_x1, rows, "log_x1");
    if (log_x1.is_cpu()) check_targets(p.target, rows, vocab, "log_x1", nullptr, nullptr);
  }
  p.t = scalars_of(t, rows, "t");
  p.c = checked_gap(beta, vocab);
  p.log = log;
  p.out = rows_of(out, rows, vocab, "out");
  if (rows > 0) KLFLOW_RUN(logit_interpolate, p, out);
}

Tensor logit_interpolate(Tensor log_x0, Tensor log_x1, Tensor t, double beta, bool log) {
  Tensor out = torch::stable::new_empty(log_x0, log_x0.sizes());
  logit_interpolate_out(log_x0, log_x1, t, beta, log, out);
  return out;
}

CrossEntropyParams cross_entropy_params(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                                        const OptionalTensor& row_weight, int64_t ignore_index, double label_smoothing,
                                        double z_loss, double softcap, const Tensor& lse) {
  check(logits.dim() == 2, "logits: must have two axes");
  CrossEntropyParams p{};
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.logits = rows_of(logits, p.rows, p.vocab, "logits");
  p.ignore_index = ignore_index;
  if (target.dim() == 2) {
    p.soft = rows_of(target, p.rows, p.vocab, "target");
  } else {
    p.target = tokens_of(target, p.rows, "target");
    if (logits.is_cpu()) check_targets(p.target, p.rows, p.vocab, "target", nullptr, &ignore_index);
  }
  if (weight.has_value()) p.weight = vector_of(*weight, p.vocab, "weight");
  p.row_weight = scalars_of(row_weight, p.rows, "row_weight");
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  p.softcap = static_cast<float>(softcap);
  p.lse = vector_of(lse, p.rows, "lse");
  return p;
}

void cross_entropy_out(Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
                       int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Tensor loss,
                       Tensor lse) {
  CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  p.loss = vector_of(loss, p.rows, "loss");
  if (p.rows > 0) KLFLOW_RUN(cross_entropy, p, logits);
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
                                         int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  const int64_t rows = logits.size(0);
  Tensor loss = torch::stable::new_empty(logits, {&rows, 1}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {&rows, 1}, ScalarType::Float);
  cross_entropy_out(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, loss, lse);
  return {loss, lse};
}

// The rows' loss summed, and divided by the sum over kept rows of weight[target] row_weight where mean: on a CPU two
// more operators for it would cost as much as a short row.
std::tuple<Tensor, Tensor> cross_entropy_total(Tensor logits, Tensor target, OptionalTensor weight,
                                               OptionalTensor row_weight, int64_t ignore_index, double label_smoothing,
                                               double z_loss, double softcap, bool mean) {
  auto [loss, lse] = cross_entropy(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap);
  Tensor total = torch::stable::new_empty(logits, torch::headeronly::IntHeaderOnlyArrayRef(), ScalarType::Float);
  const CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  const float* rows = vector_of(loss, p.rows, "loss");
  double sum = 0.0, divisor = 0.0;
  for (int64_t row = 0; row < p.rows; ++row) {
    sum += rows[row];
    double share = p.row_weight.at(row, 1.0f);
    if (p.target.data != nullptr) {
      const int64_t token = p.target.at(row);
      if (token == ignore_index) continue;
      if (p.weight != nullptr) share *= p.weight[token];
    }
    divisor += share;
  }
  *static_cast<float*>(total.data_ptr()) = static_cast<float>(mean ? sum / divisor : sum);
  return {total, lse};
}

void cross_entropy_grad(Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
                        int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Tensor dloss,
                        Tensor loss, Tensor lse, Tensor grad) {
  CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  p.loss = vector_of(loss, p.rows, "loss");
  p.dloss = scalars_of(dloss, p.rows, "dloss");
  p.grad = rows_of(grad, p.rows, p.vocab, "grad");
  check(p.grad.dtype == p.logits.dtype, "grad: must have the dtype of logits");
  prefer_huge_pages(grad);
  if (p.rows > 0) KLFLOW_RUN(cross_entropy, p, logits);
}

void cross_entropy_backward(Tensor logits, Tensor target, Tensor lse, OptionalTensor weight, OptionalTensor row_weight,
                            int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Tensor dloss,
                            OptionalTensor dlse, Tensor grad) {
  CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  p.dloss = scalars_of(dloss, p.rows, "dloss");
  p.dlse = scalars_of(dlse, p.rows, "dlse");
  p.grad = rows_of(grad, p.rows, p.vocab, "grad");
  check(p.grad.dtype == p.logits.dtype, "grad: must have the dtype of logits");
  prefer_huge_pages(grad);
  if (p.rows > 0) KLFLOW_RUN(cross_entropy, p, logits);
}

// On the CPU, where it costs nothing, each must lie in [low, high].
Scalars scalars_within(const Tensor& t, int64_t rows, const char* name, double low, double high) {
  const Scalars scalars = scalars_of(t, rows, name);
  for (int64_t row = 0; t.is_cpu() && row < (scalars.stride == 0 ? std::min<int64_t>(rows, 1) : rows); ++row) {
    const float value = scalars.at(row);
    check(value >= low && value <= high, name, ": got ", value, ", allowed is a number in [", low, ", ", high, "]");
  }
  return scalars;
}
// Within these bounds logits up to 10^8 divided by it are no infinities, and its inverse is no denormal number.
Scalars temperature_of(const Tensor& t, int64_t rows) {
  return scalars_within(t, rows, "temperature", 0.99e-30, 1.01e30);
}

TopkSampleParams topk_params(const Tensor& logits, int64_t k, const Tensor& rng, const Tensor& temperature,
                             const Tensor& top_p, const OptionalTensor& given, const OptionalTensor& known,
                             int64_t row_offset, const Tensor& token) {
  check(logits.dim() == 2, "logits: must have two axes");
  TopkSampleParams p{};
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  check(k >= 1 && k <= p.vocab, "k: ", k, " is not in [1, ", p.vocab, "]");
  p.k = k;
  p.logits = rows_of(logits, p.rows, p.vocab, "logits");
  p.temperature = temperature_of(temperature, p.rows);
  p.top_p = scalars_within(top_p, p.rows, "top_p", 0.0, 1.0);
  p.rng = rng_of(rng, p.rows, row_offset);
  p.given = given_of(given, known, p.rows);
  check(p.given.flags == nullptr || p.given.known.data != nullptr || p.rows == 0, "known: needed where given is");
  if (logits.is_cpu() && p.given.flags != nullptr)
    check_targets(p.given.known, p.rows, p.vocab, "known", &p.given, nullptr);
  p.token = token_vector_of(token, p.rows, "token");
  return p;
}

void topk_sample(Tensor logits, int64_t k, Tensor rng, Tensor temperature, Tensor top_p, int64_t row_offset,
                 Tensor token, Tensor log_prob) {
  TopkSampleParams p = topk_params(logits, k, rng, temperature, top_p, std::nullopt, std::nullopt, row_offset, token);
  p.log_prob = vector_of(log_prob, p.rows, "log_prob");
  if (p.rows > 0) KLFLOW_RUN(topk_sample, p, logits);
}

void topk_renoise(Tensor logits, int64_t k, Tensor t_next, Tensor rng, Tensor temperature, Tensor top_p, double beta,
                  OptionalTensor given, OptionalTensor known, int64_t row_offset, Tensor token, Tensor out) {
  TopkRenoiseParams p{};
  p.sample = topk_params(logits, k, rng, temperature, top_p, given, known, row_offset, token);
  p.t_next = scalars_of(t_next, p.sample.rows, "t_next");
  p.c = checked_gap(beta, p.sample.vocab);
  p.out = rows_of(out, p.sample.rows, p.sample.vocab, "out");
  if (p.sample.rows > 0) KLFLOW_RUN(topk_renoise, p, logits);
}

void euler_step(Tensor log_x, Tensor logits, Tensor rate, Tensor temperature, double beta, OptionalTensor given,
                OptionalTensor known, Tensor log_x_next, Tensor x_next) {
  check(logits.dim() == 2, "logits: must have two axes");
  EulerStepParams p{};
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.logits = rows_of(logits, p.rows, p.vocab, "logits");
  p.log_x = rows_of(log_x, p.rows, p.vocab, "log_x");
  p.rate = scalars_of(rate, p.rows, "rate");
  p.temperature = temperature_of(temperature, p.rows);
  p.c = checked_gap(beta, p.vocab);
  p.given = given_of(given, known, p.rows);
  check(p.given.flags == nullptr || p.given.known.data != nullptr || p.rows == 0, "known: needed where given is");
  if (logits.is_cpu() && p.given.flags != nullptr)
    check_targets(p.given.known, p.rows, p.vocab, "known", &p.given, nullptr);
  p.log_x_next = rows_of(log_x_next, p.rows, p.vocab, "log_x_next");
  check(p.log_x_next.dtype == p.log_x.dtype, "log_x_next: must have the dtype of log_x");
  p.x_next = rows_of(x_next, p.rows, p.vocab, "x_next");
  if (p.rows > 0) KLFLOW_RUN(euler_step, p, logits);
}

const float* log_prior_of(const Tensor& t, int64_t vocab) { return vector_of(t, vocab, "log_prior"); }

template <class T>
T* matrix_of(const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype, const char* name) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype && t.is_contiguous(),
        name, ": must be contiguous of shape (", rows, ", ", columns, ") and the declared dtype");
  return static_cast<T*>(t.data_ptr());
}

void noise_tile(Tensor target, Tensor t, Tensor rng, OptionalTensor given, OptionalTensor log_prior,
                OptionalTensor stats, double beta, int64_t row_offset, int64_t vocab, int64_t column, bool log,
                OptionalTensor sum, Tensor out) {
  check(out.dim() == 2, "out: must have two axes");
  NoiseTileParams p{};
  p.rows = out.size(0);
  p.vocab = vocab;
  p.column = column;
  p.columns = out.size(1);
  check(column >= 0 && column % 4 == 0 && column + p.columns <= vocab, "column: ", column,
        " is not a multiple of 4 whose tile ends within V = ", vocab);
  p.target = tokens_of(target, p.rows, "target");
  p.t = scalars_of(t, p.rows, "t");
  p.rng = rng_of(rng, p.rows, row_offset);
  p.given = given_of(given, std::nullopt, p.rows);
  p.c = checked_gap(beta, vocab);
  check(log_prior.has_value() == stats.has_value() && log_prior.has_value() != sum.has_value(),
        "needed are either log_prior and stats, or sum");
  check(!log || log_prior.has_value(), "log: allowed with log_prior only");
  p.log = log;
  if (log_prior.has_value()) {
    p.log_prior = log_prior_of(*log_prior, vocab);
    p.stats = matrix_of<float>(*stats, p.rows, 3, ScalarType::Float, "stats");
  } else {
    check(sum->dim() == 1 && sum->size(0) == p.rows && sum->scalar_type() == ScalarType::Double && sum->is_contiguous(),
          "sum: must be contiguous float64 of shape (", p.rows, ",)");
    p.sum = static_cast<double*>(sum->data_ptr());
  }
  p.out = rows_of(out, p.rows, p.columns, "out");
  if (p.rows == 0 || p.columns == 0) return;
  if (out.is_cpu()) check_targets(p.target, p.rows, vocab, "target", nullptr, nullptr);
  KLFLOW_RUN(noise_tile, p, out);
}

PosteriorParams posterior_params(const Tensor& t, const Tensor& log_prior, double beta, const Tensor& ids,
                                 const Tensor& q, const Tensor& rest) {
  check(ids.dim() == 2 && log_prior.dim() == 1, "ids: must have two axes, log_prior one");
  PosteriorParams p{};
  p.rows = ids.size(0);
  p.vocab = log_prior.size(0);
  p.top = ids.size(1);
  check(p.top <= p.vocab, "ids: more columns than V = ", p.vocab);
  p.t = scalars_of(t, p.rows, "t");
  p.c = checked_gap(beta, p.vocab);
  p.log_prior = log_prior_of(log_prior, p.vocab);
  p.ids = matrix_of<int32_t>(ids, p.rows, p.top, ScalarType::Int, "ids");
  p.q = matrix_of<float>(q, p.rows, p.top, ScalarType::Float, "q");
  p.rest = vector_of(rest, p.rows, "rest");
  return p;
}

// With boosts, target is (rows, slots): a slot holds a token or -1, and the first of a given row its token.
void check_slots(const PosteriorParams& p) {
  for (int64_t row = 0; row < p.rows; ++row)
    for (int64_t slot = 0; slot < p.slots; ++slot) {
      const int64_t value = p.target.at(row, slot);
      const bool given = slot == 0 && p.given.at(row);
      if (value >= (given ? 0 : -1) && value < p.vocab) continue;
      std::ostringstream message;
      message << "target: row " << row << " holds " << value << ", allowed is 0 to V - 1 = " << p.vocab - 1
              << (given ? " (a given row)" : " or -1, an unused slot");
      throw std::out_of_range(message.str());
    }
}

void noise_posterior(Tensor target, Tensor t, Tensor rng, OptionalTensor given, OptionalTensor boost, Tensor log_prior,
                     double beta, int64_t row_offset, Tensor ids, Tensor q, Tensor rest, OptionalTensor stats) {
  PosteriorParams p = posterior_params(t, log_prior, beta, ids, q, rest);
  p.slots = 1;
  if (boost.has_value()) {
    check(boost->dim() == 2 && target.dim() == 2 && target.is_contiguous() && !stats.has_value(),
          "boost: target must be contiguous of the same two axes, stats absent");
    p.slots = boost->size(1);
    p.boost = matrix_of<float>(*boost, p.rows, p.slots, ScalarType::Float, "boost");
    check(target.size(0) == p.rows && target.size(1) == p.slots && p.slots >= 1,
          "target: must have the shape of boost");
    const bool int32 = target.scalar_type() == ScalarType::Int;
    check(int32 || target.scalar_type() == ScalarType::Long, "target: dtype must be int64 or int32");
    p.target = {target.data_ptr(), p.slots, int32, 0};
  } else {
    p.target = tokens_of(target, p.rows, "target");
  }
  p.rng = rng_of(rng, p.rows, row_offset);
  p.given = given_of(given, std::nullopt, p.rows);
  if (stats.has_value()) p.stats = matrix_of<float>(*stats, p.rows, 3, ScalarType::Float, "stats");
  if (p.rows == 0) return;
  if (ids.is_cpu() && p.boost != nullptr) check_slots(p);
  if (ids.is_cpu() && p.boost == nullptr) check_targets(p.target, p.rows, p.vocab, "target", nullptr, nullptr);
  run_posterior(p, rest);
}

void token_posterior(Tensor log_x, Tensor t, Tensor log_prior, double beta, Tensor ids, Tensor q, Tensor rest) {
  PosteriorParams p = posterior_params(t, log_prior, beta, ids, q, rest);
  p.log_x = rows_of(log_x, p.rows, p.vocab, "log_x");
  run_posterior(p, rest);
}

void gather_rows(Tensor ids, Tensor q, Tensor rest, Tensor weight, Tensor mean, Tensor out) {
  check(ids.dim() == 2 && weight.dim() == 2, "ids, weight: must have two axes");
  GatherRowsParams p{};
  p.rows = ids.size(0);
  p.top = ids.size(1);
  p.width = weight.size(1);
  p.ids = matrix_of<int32_t>(ids, p.rows, p.top, ScalarType::Int, "ids");
  p.q = matrix_of<float>(q, p.rows, p.top, ScalarType::Float, "q");
  p.rest = vector_of(rest, p.rows, "rest");
  p.mean = vector_of(mean, p.width, "mean");
  p.weight = rows_of(weight, weight.size(0), p.width, "weight");
  p.out = rows_of(out, p.rows, p.width, "out");
  if (out.is_cpu()) check_targets({p.ids, 1, 1, 0}, p.rows * p.top, weight.size(0), "ids.flatten()", nullptr, nullptr);
  if (p.rows > 0) KLFLOW_RUN(gather_rows, p, out);
}

// order holds them as int32.
void check_pairs(int64_t pairs) {
  check(pairs < int64_t{1} << 31, "ids: ", pairs, " entries, allowed are fewer than 2^31");
}

void scatter_rows(Tensor order, Tensor starts, Tensor q, Tensor prior, Tensor g, Tensor dout, Tensor dweight) {
  check(q.dim() == 2 && dweight.dim() == 2, "q, dweight: must have two axes");
  ScatterRowsParams p{};
  const int64_t rows = q.size(0);
  p.top = q.size(1);
  p.pairs = rows * p.top;
  p.vocab = dweight.size(0);
  p.width = dweight.size(1);
  check(order.dim() == 1 && order.size(0) == p.pairs && order.scalar_type() == ScalarType::Int && order.is_contiguous(),
        "order: must be contiguous int32 of shape (", p.pairs, ",)");
  p.order = static_cast<const int32_t*>(order.data_ptr());
  p.starts = token_vector_of(starts, p.vocab + 1, "starts");
  p.q = matrix_of<float>(q, rows, p.top, ScalarType::Float, "q");
  p.prior = vector_of(prior, p.vocab, "prior");
  p.g = vector_of(g, p.width, "g");
  p.dout = rows_of(dout, rows, p.width, "dout");
  p.dweight = rows_of(dweight, p.vocab, p.width, "dweight");
  check_pairs(p.pairs);
  check(p.dweight.dtype == kFloat32, "dweight: dtype must be float32");
  prefer_huge_pages(dweight);
  KLFLOW_RUN(scatter_rows, p, dweight);
}

// order: the pairs n * top + i sorted by ids_ni, stable; starts: where each token's group begins. A counting sort; on
// CUDA torch.sort serves.
void group_by_token(Tensor ids, int64_t vocab, Tensor order, Tensor starts) {
  check(ids.dim() == 2, "ids: must have two axes");
  const int64_t pairs = ids.size(0) * ids.size(1);
  const int32_t* id = matrix_of<int32_t>(ids, ids.size(0), ids.size(1), ScalarType::Int, "ids");
  check(order.dim() == 1 && order.size(0) == pairs && order.scalar_type() == ScalarType::Int && order.is_contiguous(),
        "order: must be contiguous int32 of shape (", pairs, ",)");
  check_pairs(pairs);
  int32_t* out = static_cast<int32_t*>(order.data_ptr());
  int64_t* start = token_vector_of(starts, vocab + 1, "starts");
  std::vector<int32_t> next(vocab + 1);
  for (int64_t i = 0; i < pairs; ++i) {
    check(id[i] >= 0 && id[i] < vocab, "ids: holds ", id[i], ", outside [0, ", vocab, ")");
    ++next[id[i] + 1];
  }
  for (int64_t v = 0; v < vocab; ++v) next[v + 1] += next[v];
  std::copy(next.begin(), next.end(), start);
  for (int64_t i = 0; i < pairs; ++i) out[next[id[i]]++] = static_cast<int32_t>(i);
}

}  // namespace
}  // namespace klflow

STABLE_TORCH_LIBRARY(klflow, m) {
  m.def(
      "noise_interpolate(Tensor target, Tensor t, Tensor rng, Tensor? given, float beta, SymInt row_offset, bool log, "
      "Tensor(a!) out) -> ()");
  m.def("logit_interpolate(Tensor log_x0, Tensor log_x1, Tensor t, float beta, bool log) -> Tensor");
  m.def("logit_interpolate_out(Tensor log_x0, Tensor log_x1, Tensor t, float beta, bool log, Tensor(a!) out) -> ()");
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap) -> (Tensor loss, Tensor lse)");
  m.def(
      "cross_entropy_out(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, Tensor(a!) loss, Tensor(b!) lse) -> ()");
  m.def(
      "cross_entropy_total(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, bool mean) -> (Tensor total, Tensor lse)");
  m.def(
      "cross_entropy_grad(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, "
      "float label_smoothing, float z_loss, float softcap, Tensor dloss, Tensor(a!) loss, Tensor(b!) lse, "
      "Tensor(c!) grad) -> ()");
  m.def(
      "cross_entropy_backward(Tensor logits, Tensor target, Tensor lse, Tensor? weight, Tensor? row_weight, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap, Tensor dloss, Tensor? dlse, "
      "Tensor(a!) grad) -> ()");
  m.def(
      "topk_sample(Tensor logits, int k, Tensor rng, Tensor temperature, Tensor top_p, SymInt row_offset, Tensor(a!) "
      "token, "
      "Tensor(b!) log_prob) -> ()");
  m.def(
      "topk_renoise(Tensor logits, int k, Tensor t_next, Tensor rng, Tensor temperature, Tensor top_p, float beta, "
      "Tensor? given, Tensor? known, SymInt row_offset, Tensor(a!) token, Tensor(b!) out) -> ()");
  m.def(
      "euler_step(Tensor log_x, Tensor logits, Tensor rate, Tensor temperature, float beta, Tensor? given, "
      "Tensor? known, Tensor(a!) log_x_next, Tensor(b!) x_next) -> ()");
  m.def(
      "noise_tile(Tensor target, Tensor t, Tensor rng, Tensor? given, Tensor? log_prior, Tensor? stats, float beta, "
      "SymInt row_offset, int vocab, int column, bool log, Tensor(a!)? sum, Tensor(b!) out) -> ()");
  m.def(
      "noise_posterior(Tensor target, Tensor t, Tensor rng, Tensor? given, Tensor? boost, Tensor log_prior, float "
      "beta, "
      "SymInt row_offset, Tensor(a!) ids, Tensor(b!) q, Tensor(c!) rest, Tensor(d!)? stats) -> ()");
  m.def(
      "token_posterior(Tensor log_x, Tensor t, Tensor log_prior, float beta, Tensor(a!) ids, Tensor(b!) q, "
      "Tensor(c!) rest) -> ()");
  m.def("gather_rows(Tensor ids, Tensor q, Tensor rest, Tensor weight, Tensor mean, Tensor(a!) out) -> ()");
  m.def(
      "scatter_rows(Tensor order, Tensor starts, Tensor q, Tensor prior, Tensor g, Tensor dout, Tensor(a!) dweight) "
      "-> ()");
  m.def("group_by_token(Tensor ids, int vocab, Tensor(a!) order, Tensor(b!) starts) -> ()");
}

#define KLFLOW_IMPLEMENT(m)                                                     \
  m.impl("noise_interpolate", TORCH_BOX(&klflow::noise_interpolate));           \
  m.impl("logit_interpolate", TORCH_BOX(&klflow::logit_interpolate));           \
  m.impl("logit_interpolate_out", TORCH_BOX(&klflow::logit_interpolate_out));   \
  m.impl("cross_entropy", TORCH_BOX(&klflow::cross_entropy));                   \
  m.impl("cross_entropy_out", TORCH_BOX(&klflow::cross_entropy_out));           \
  m.impl("cross_entropy_grad", TORCH_BOX(&klflow::cross_entropy_grad));         \
  m.impl("cross_entropy_backward", TORCH_BOX(&klflow::cross_entropy_backward)); \
  m.impl("topk_sample", TORCH_BOX(&klflow::topk_sample));                       \
  m.impl("topk_renoise", TORCH_BOX(&klflow::topk_renoise));                     \
  m.impl("euler_step", TORCH_BOX(&klflow::euler_step));                         \
  m.impl("noise_tile", TORCH_BOX(&klflow::noise_tile));                         \
  m.impl("noise_posterior", TORCH_BOX(&klflow::noise_posterior));               \
  m.impl("token_posterior", TORCH_BOX(&klflow::token_posterior));               \
  m.impl("gather_rows", TORCH_BOX(&klflow::gather_rows));                       \
  m.impl("scatter_rows", TORCH_BOX(&klflow::scatter_rows));

STABLE_TORCH_LIBRARY_IMPL(klflow, CPU, m) {
  KLFLOW_IMPLEMENT(m)
  m.impl("group_by_token", TORCH_BOX(&klflow::group_by_token));
  m.impl("cross_entropy_total", TORCH_BOX(&klflow::cross_entropy_total));
}
#ifdef KLFLOW_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(klflow, CUDA, m){KLFLOW_IMPLEMENT(m)}
#endif

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
