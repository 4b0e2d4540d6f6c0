// One basic step: p = softmax(logits / T); l = (1 - rate) log_x + rate c p; writes log softmax l and softmax l.
// The probabilities p and the combined row l are never built outside the cache.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

template <class L, class S, class X>
void step_row(const EulerStepParams& p, int64_t row, bool streamed) {
  const L* logits = row_of<L>(p.logits, row);
  const S* state = row_of<S>(p.log_x, row);
  S* state_next = row_of<S>(p.log_x_next, row);
  X* x_next = row_of<X>(p.x_next, row);
  if (p.given.at(row)) {
    const int64_t token = p.given.known.at(row);
    store_onehot(state_next, p.vocab, token, true);
    store_onehot(x_next, p.vocab, token, false);
    return;
  }
  // In scratch rows: exp(logits - shift), then l over it; exp(l - shift); and the shifts of the blocks.
  float *l = scratch_row(p.vocab), *e = scratch_row(p.vocab, 1), *shifts = scratch_row(p.vocab, 2);
  const float rate = p.rate.at(row);
  StreamingSum logits_sum(1.0f / p.temperature.at(row));
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    logits_sum.add(logits + start, n, l + start);
    shifts[start / kBlock] = logits_sum.shift();
  }
  const float keep = 1.0f - rate;
  StreamingSum sum;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    const float gain = rate * p.c * logits_sum.factor(shifts[start / kBlock]);
    for_vectors(n, [&](int64_t i, int m) {
      vf value = load_n(l + start + i, m, 0.0f) * gain;
      if (keep != 0.0f) value += load_n(state + start + i, m, -kInf) * keep;
      store_n(l + start + i, value, m);
    });
    sum.add(l + start, n, e + start);
    shifts[start / kBlock] = sum.shift();
  }
  const float shift = sum.shift(), log_total = static_cast<float>(sum.log_total());
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t end = std::min(p.vocab, start + kBlock);
    const float factor = sum.factor(shifts[start / kBlock]);
    write_span(state_next, start, end, false, false,
               [&](int64_t i, int m) { return load_n(l + i, m, 0.0f) - shift - log_total; });
    write_span(x_next, start, end, streamed, false, [&](int64_t i, int m) { return load_n(e + i, m, 0.0f) * factor; });
  }
}

}  // namespace

void euler_step(const EulerStepParams& p, int64_t begin, int64_t end) {
  for_dtype(p.logits.dtype, [&](auto* a) {
    for_dtype(p.log_x.dtype, [&](auto* b) {
      for_dtype(p.x_next.dtype, [&](auto* c) {
        using X = element<decltype(c)>;
        const bool streamed = is_streamed<X>(p.rows, p.vocab);
        for (int64_t row = begin; row < end; ++row)
          step_row<element<decltype(a)>, element<decltype(b)>, X>(p, row, streamed);
        if (streamed) stream_fence();
      });
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
