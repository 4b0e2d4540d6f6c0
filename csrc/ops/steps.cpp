// What a sampler does with logits: topk_sample draws tokens, topk_renoise also makes their next x_t, euler_step moves a
// dense state.
#include <algorithm>

#include "run.h"

namespace klflow {
namespace {

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
  KLFLOW_CHECK_DEVICES(logits, rng, temperature, top_p, token, log_prob);
  TopkSampleParams p = topk_params(logits, k, rng, temperature, top_p, std::nullopt, std::nullopt, row_offset, token);
  p.log_prob = vector_of(log_prob, p.rows, "log_prob");
  if (p.rows > 0) KLFLOW_RUN(topk_sample, p, logits);
}
KLFLOW_OPERATOR(
    topk_sample,
    "(Tensor logits, int k, Tensor rng, Tensor temperature, Tensor top_p, SymInt row_offset, Tensor(a!) token, "
    "Tensor(b!) log_prob) -> ()")

void topk_renoise(Tensor logits, int64_t k, Tensor t_next, Tensor rng, Tensor temperature, Tensor top_p, double beta,
                  OptionalTensor given, OptionalTensor known, int64_t row_offset, Tensor token, Tensor out) {
  KLFLOW_CHECK_DEVICES(logits, t_next, rng, temperature, top_p, given, known, token, out);
  TopkRenoiseParams p{};
  p.sample = topk_params(logits, k, rng, temperature, top_p, given, known, row_offset, token);
  p.t_next = scalars_of(t_next, p.sample.rows, "t_next");
  p.c = checked_gap(beta, p.sample.vocab);
  p.out = rows_of(out, p.sample.rows, p.sample.vocab, "out");
  if (p.sample.rows > 0) KLFLOW_RUN(topk_renoise, p, logits);
}
KLFLOW_OPERATOR(topk_renoise,
                "(Tensor logits, int k, Tensor t_next, Tensor rng, Tensor temperature, Tensor top_p, float beta, "
                "Tensor? given, Tensor? known, SymInt row_offset, Tensor(a!) token, Tensor(b!) out) -> ()")

void euler_step(Tensor log_x, Tensor logits, Tensor rate, Tensor temperature, double beta, OptionalTensor given,
                OptionalTensor known, Tensor log_x_next, Tensor x_next) {
  KLFLOW_CHECK_DEVICES(log_x, logits, rate, temperature, given, known, log_x_next, x_next);
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
KLFLOW_OPERATOR(
    euler_step,
    "(Tensor log_x, Tensor logits, Tensor rate, Tensor temperature, float beta, Tensor? given, Tensor? known, "
    "Tensor(a!) log_x_next, Tensor(b!) x_next) -> ()")

}  // namespace
}  // namespace klflow
