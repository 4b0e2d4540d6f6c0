// softmax((1 - t) log_x0 + t log_x1) of given rows, or of targets (log_x1 = c onehot up to a constant).
// One read of the inputs, one write; the combined row stays in the thread's scratch row, in cache.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

void logit_interpolate(const LogitInterpolateParams& p, int64_t begin, int64_t end) {
  for_dtype(p.out.dtype, [&](auto* out_type) {
    using Out = element<decltype(out_type)>;
    for_dtype(p.log_x0.dtype, [&](auto* in_type) {
      using In = element<decltype(in_type)>;
      float* l = scratch_row(p.vocab);
      for (int64_t row = begin; row < end; ++row) {
        const float t = p.t.data[row * p.t.stride];
        const In* a = row_of<In>(p.log_x0, row);
        const In* b = p.log_x1.data != nullptr ? row_of<In>(p.log_x1, row) : nullptr;
        const int64_t token = b != nullptr ? -1 : token_at(p.target, row);
        StreamingSum sum;
        for (int64_t start = 0; start < p.vocab; start += kBlock) {
          const int64_t n = std::min(kBlock, p.vocab - start);
          // A weight of exactly 0 drops its end point, so that 0 * -inf is no NaN: x_0 at t = 0, x_1 at t = 1.
          for_vectors(n, [&](int64_t i, int m) {
            vf value = t == 1.0f ? vf{} : load_n(a + start + i, m, -kInf) * (1.0f - t);
            if (b != nullptr && t != 0.0f) value += load_n(b + start + i, m, -kInf) * t;
            store_n(l + start + i, value, m);
          });
          if (token >= start && token < start + n) l[token] += t * p.c;
          sum.add(l + start, n, 1.0f);
        }
        const float lse = sum.lse();
        Out* out = row_of<Out>(p.out, row);
        for_vectors(p.vocab, [&](int64_t i, int m) {
          const vf v = load_n(l + i, m, 0.0f) - lse;
          store_n(out + i, p.log ? v : expv(v), m);
        });
      }
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
