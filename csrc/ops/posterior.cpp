// The largest entries of the posterior of each token given its own noisy row: noise_posterior, of in-kernel noise, and
// token_posterior, of a dense state.
#include <torch/csrc/stable/ops.h>

#include "run.h"

namespace klflow {
namespace {

// What posterior needs beside its arguments: see PosteriorParams::scratch.
Tensor posterior_scratch(PosteriorParams& p, const Tensor& like, int64_t rows, int64_t columns) {
  const int64_t size = rows * columns;
  Tensor scratch = torch::stable::new_empty(like, {&size, 1}, ScalarType::Float);
  if (size > 0) p.scratch = static_cast<float*>(scratch.data_ptr());
  return scratch;
}

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
  KLFLOW_CHECK_DEVICES(target, t, rng, given, boost, log_prior, ids, q, rest, stats);
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
KLFLOW_OPERATOR(noise_posterior,
                "(Tensor target, Tensor t, Tensor rng, Tensor? given, Tensor? boost, Tensor log_prior, float beta, "
                "SymInt row_offset, Tensor(a!) ids, Tensor(b!) q, Tensor(c!) rest, Tensor(d!)? stats) -> ()")

void token_posterior(Tensor log_x, Tensor t, Tensor log_prior, double beta, Tensor ids, Tensor q, Tensor rest) {
  KLFLOW_CHECK_DEVICES(log_x, t, log_prior, ids, q, rest);
  PosteriorParams p = posterior_params(t, log_prior, beta, ids, q, rest);
  p.log_x = rows_of(log_x, p.rows, p.vocab, "log_x");
  run_posterior(p, rest);
}
KLFLOW_OPERATOR(
    token_posterior,
    "(Tensor log_x, Tensor t, Tensor log_prior, float beta, Tensor(a!) ids, Tensor(b!) q, Tensor(c!) rest) -> ()")

}  // namespace
}  // namespace klflow
