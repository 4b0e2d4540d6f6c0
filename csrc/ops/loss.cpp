// cross_entropy: the rows' loss and lse; _out into given tensors; _total summed or averaged; _grad with the gradient
// from the same read; _backward the gradient alone.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "run.h"

namespace klflow {
namespace {

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
  KLFLOW_CHECK_DEVICES(logits, target, weight, row_weight, loss, lse);
  CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  p.loss = vector_of(loss, p.rows, "loss");
  if (p.rows > 0) KLFLOW_RUN(cross_entropy, p, logits);
}
KLFLOW_OPERATOR(
    cross_entropy_out,
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, Tensor(a!) loss, Tensor(b!) lse) -> ()")

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
                                         int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  const int64_t rows = logits.size(0);
  Tensor loss = torch::stable::new_empty(logits, {&rows, 1}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {&rows, 1}, ScalarType::Float);
  cross_entropy_out(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, loss, lse);
  return {loss, lse};
}
KLFLOW_OPERATOR(
    cross_entropy,
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap) -> (Tensor loss, Tensor lse)")

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
KLFLOW_CPU_OPERATOR(
    cross_entropy_total,
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, bool mean) -> (Tensor total, Tensor lse)")

// Writes the gradient of the logits, times dloss of each row, to grad.
void run_gradient(CrossEntropyParams& p, const Tensor& logits, const Tensor& dloss, const Tensor& grad) {
  p.dloss = scalars_of(dloss, p.rows, "dloss");
  p.grad = rows_of(grad, p.rows, p.vocab, "grad");
  check(p.grad.dtype == p.logits.dtype, "grad: must have the dtype of logits");
  prefer_huge_pages(grad);
  if (p.rows > 0) KLFLOW_RUN(cross_entropy, p, logits);
}

void cross_entropy_grad(Tensor logits, Tensor target, OptionalTensor weight, OptionalTensor row_weight,
                        int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Tensor dloss,
                        Tensor loss, Tensor lse, Tensor grad) {
  KLFLOW_CHECK_DEVICES(logits, target, weight, row_weight, dloss, loss, lse, grad);
  CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  p.loss = vector_of(loss, p.rows, "loss");
  run_gradient(p, logits, dloss, grad);
}
KLFLOW_OPERATOR(
    cross_entropy_grad,
    "(Tensor logits, Tensor target, Tensor? weight, Tensor? row_weight, int ignore_index, float label_smoothing, "
    "float z_loss, float softcap, Tensor dloss, Tensor(a!) loss, Tensor(b!) lse, Tensor(c!) grad) -> ()")

void cross_entropy_backward(Tensor logits, Tensor target, Tensor lse, OptionalTensor weight, OptionalTensor row_weight,
                            int64_t ignore_index, double label_smoothing, double z_loss, double softcap, Tensor dloss,
                            OptionalTensor dlse, Tensor grad) {
  KLFLOW_CHECK_DEVICES(logits, target, lse, weight, row_weight, dloss, dlse, grad);
  CrossEntropyParams p =
      cross_entropy_params(logits, target, weight, row_weight, ignore_index, label_smoothing, z_loss, softcap, lse);
  p.dlse = scalars_of(dlse, p.rows, "dlse");
  run_gradient(p, logits, dloss, grad);
}
KLFLOW_OPERATOR(
    cross_entropy_backward,
    "(Tensor logits, Tensor target, Tensor lse, Tensor? weight, Tensor? row_weight, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, Tensor dloss, Tensor? dlse, Tensor(a!) grad) -> ()")

}  // namespace
}  // namespace klflow
