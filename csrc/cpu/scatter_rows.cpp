// dweight_v = prior_v g + sum of q_ni dout_n over the pairs of token v, in their order: every row of dweight is written
// once, with no atomics. Bound by that write and by reading pairs rows of dout, which stay in cache.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

namespace {

// The token whose unit (see rows_of in dispatch.cpp) is the first at or after `unit`: starts[v] + v grows with v.
int64_t token_of_unit(const ScatterRowsParams& p, int64_t unit) {
  int64_t low = 0, high = p.vocab;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.starts[middle] + middle >= unit)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace

void scatter_rows(const ScatterRowsParams& p, int64_t begin, int64_t end) {
  for_dtype(p.dout.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    const int64_t first = token_of_unit(p, begin), last = token_of_unit(p, end);
    for (int64_t token = first; token < last; ++token) {
      float* sum = row_of<float>(p.dweight, token);
      for (int64_t d = 0; d < p.width; ++d) sum[d] = p.prior[token] * p.g[d];
      for (int64_t i = p.starts[token]; i < p.starts[token + 1]; ++i) {
        const int32_t pair = p.order[i];
        const float q = p.q[pair];
        const T* source = row_of<T>(p.dout, pair / p.top);
        for_vectors(p.width, [&](int64_t d, int m) {
          store_n(sum + d, load_n(sum + d, m, 0.0f) + load_n(source + d, m, 0.0f) * q, m);
        });
      }
    }
  });
}

}  // namespace klflow::KLFLOW_ISA
