// softmax((1 - t) log_x0 + t log_x1) of given rows, or of targets (log_x1 = c onehot up to a constant).
// One read of the inputs, one write; the combined row stays in the thread's scratch row, in cache.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

template <class In, class Out>
void interpolate_row(const LogitInterpolateParams& p, int64_t row, bool streamed) {
  float* y = scratch_row(p.vocab);          // log: l, else exp(l - shift) of each block
  float* shifts = scratch_row(p.vocab, 1);  // of the blocks
  float block[kBlock + kLanes];             // l, where y is not
  const float t = p.t.at(row);
  const In* a = row_of<In>(p.log_x0, row);
  const In* b = p.log_x1.data != nullptr ? row_of<In>(p.log_x1, row) : nullptr;
  const int64_t token = b != nullptr ? -1 : p.target.at(row);
  Out* out = row_of<Out>(p.out, row);
  // A weight of exactly 0 drops its end point, so that 0 * -inf is no NaN: x_0 at t = 0, x_1 at t = 1.
  const bool with_a = t != 1.0f, with_b = b != nullptr && t != 0.0f;
  StreamingSum sum;
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, p.vocab - start);
    float* l = p.log ? y + start : block;
    for_vectors(n, [&](int64_t i, int m) {
      vf value = with_a ? load_n(a + start + i, m, -kInf) * (1.0f - t) : vf{};
      if (with_b) value += load_n(b + start + i, m, -kInf) * t;
      store_n(l + i, value, m);
    });
    if (token >= start && token < start + n) l[token - start] += t * p.c;
    sum.add(l, n, p.log ? nullptr : y + start);
    shifts[start / kBlock] = sum.shift();
  }
  if (p.log) {
    const float shift = sum.shift(), log_total = static_cast<float>(sum.log_total());
    write_span(out, 0, p.vocab, streamed, false,
               [&](int64_t i, int m) { return load_n(y + i, m, 0.0f) - shift - log_total; });
    return;
  }
  for (int64_t start = 0; start < p.vocab; start += kBlock) {
    const float factor = sum.factor(shifts[start / kBlock]);
    write_span(out, start, std::min(p.vocab, start + kBlock), streamed, false,
               [&](int64_t i, int m) { return load_n(y + i, m, 0.0f) * factor; });
  }
}

}  // namespace

void logit_interpolate(const LogitInterpolateParams& p, int64_t begin, int64_t end) {
  for_dtype(p.out.dtype, [&](auto* out_type) {
    using Out = element<decltype(out_type)>;
    const bool streamed = is_streamed<Out>(p.rows, p.vocab);
    for_dtype(p.log_x0.dtype, [&](auto* in_type) {
      for (int64_t row = begin; row < end; ++row) interpolate_row<element<decltype(in_type)>, Out>(p, row, streamed);
    });
    if (streamed) stream_fence();
  });
}

}  // namespace klflow::KLFLOW_ISA
