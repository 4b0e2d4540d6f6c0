// One basic step: p = softmax(logits / T); l = (1 - rate) log_x + rate c p; writes log softmax l and softmax l.
// The probabilities p and the combined row l are never built outside the cache.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

template <class L, class S, class X>
void step_row(const EulerStepParams& p, int64_t row, float* l, float* buffer) {
  const L* logits = row_of<L>(p.logits, row);
  const S* state = row_of<S>(p.log_x, row);
  S* state_next = row_of<S>(p.log_x_next, row);
  X* x_next = row_of<X>(p.x_next, row);
  if (p.given.flags != nullptr && p.given.flags[row * p.given.stride]) {
    const int64_t token = token_at(p.given.known, row);
    store_onehot(state_next, p.vocab, token, true);
    store_onehot(x_next, p.vocab, token, false);
    return;
  }
  const float inverse_temperature = 1.0f / p.temperature, rate = p.rate.data[row * p.rate.stride];
  StreamingSum logits_sum;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    logits_sum.add(block_of(logits, start, n, buffer), n, inverse_temperature);
  }
  const float logits_lse = logits_sum.lse(), gain = rate * p.c, keep = 1.0f - rate;
  StreamingSum sum;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    for_vectors(n, [&](int64_t i, int m) {
      const vf prob = expv(load_n(logits + start + i, m, -kInf) * inverse_temperature - logits_lse);
      vf value = prob * gain;
      if (keep != 0.0f) value += load_n(state + start + i, m, -kInf) * keep;
      store_n(l + start + i, value, m);
    });
    sum.add(l + start, n, 1.0f);
  }
  const float lse = sum.lse();
  for_vectors(p.vocab, [&](int64_t i, int m) {
    const vf v = load_n(l + i, m, 0.0f) - lse;
    store_n(state_next + i, v, m);
    store_n(x_next + i, expv(v), m);
  });
}

}  // namespace

void euler_step(const EulerStepParams& p, int64_t begin, int64_t end) {
  float* l = scratch_row(p.vocab);
  float buffer[kBlock + kLanes];
  for_dtype(p.logits.dtype, [&](auto* a) {
    for_dtype(p.log_x.dtype, [&](auto* b) {
      for_dtype(p.x_next.dtype, [&](auto* c) {
        for (int64_t row = begin; row < end; ++row)
          step_row<element<decltype(a)>, element<decltype(b)>, element<decltype(c)>>(p, row, l, buffer);
      });
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
