// Noisy rows x_t: noise_interpolate, from in-kernel noise, and logit_interpolate, from given ends of the path.
#include <torch/csrc/stable/ops.h>

#include "run.h"

namespace klflow {
namespace {

void noise_interpolate(Tensor target, Tensor t, Tensor rng, OptionalTensor given, double beta, int64_t row_offset,
                       bool log, Tensor out) {
  KLFLOW_CHECK_DEVICES(target, t, rng, given, out);
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
KLFLOW_OPERATOR(
    noise_interpolate,
    "(Tensor target, Tensor t, Tensor rng, Tensor? given, float beta, SymInt row_offset, bool log, Tensor(a!) out) "
    "-> ()")

void logit_interpolate_out(Tensor log_x0, Tensor log_x1, Tensor t, double beta, bool log, Tensor out) {
  KLFLOW_CHECK_DEVICES(log_x0, log_x1, t, out);
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
KLFLOW_OPERATOR(logit_interpolate_out,
                "(Tensor log_x0, Tensor log_x1, Tensor t, float beta, bool log, Tensor(a!) out) -> ()")

Tensor logit_interpolate(Tensor log_x0, Tensor log_x1, Tensor t, double beta, bool log) {
  Tensor out = torch::stable::new_empty(log_x0, log_x0.sizes());
  logit_interpolate_out(log_x0, log_x1, t, beta, log, out);
  return out;
}
KLFLOW_OPERATOR(logit_interpolate, "(Tensor log_x0, Tensor log_x1, Tensor t, float beta, bool log) -> Tensor")

}  // namespace
}  // namespace klflow
