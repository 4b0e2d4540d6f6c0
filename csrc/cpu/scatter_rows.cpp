// dweight_v = prior_v g + sum of q_ni dout_n over the pairs of token v, in their order: every row of dweight is written
// once, with no atomics. Bound by that write and by reading pairs rows of dout, which stay in cache.
#include "dispatch.h"
#include "weighted_rows.h"

namespace klflow::KLFLOW_ISA {

namespace {

// The token whose unit (see rows_of in dispatch.h) is the first at or after `unit`: starts[v] + v grows with v.
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
    const uint32_t top = static_cast<uint32_t>(p.top);
    const int64_t first = token_of_unit(p, begin), last = token_of_unit(p, end);
    for (int64_t token = first; token < last; ++token) {
      const int32_t* order = p.order + p.starts[token];
      auto entry = [&](int64_t i) {
        return WeightedRow<T>{row_of<T>(p.dout, static_cast<uint32_t>(order[i]) / top), p.q[order[i]]};
      };
      weighted_rows(p.prior[token], p.g, p.starts[token + 1] - p.starts[token], p.width, entry,
                    row_of<float>(p.dweight, token));
    }
  });
}

}  // namespace klflow::KLFLOW_ISA
