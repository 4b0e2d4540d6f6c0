// out_n = sum_i q_ni weight[ids_ni] + rest_n mean. Bound by reading rows * top rows of the weight, mostly from cache:
// the frequent tokens recur.
#include "dispatch.h"
#include "weighted_rows.h"

namespace klflow::KLFLOW_ISA {

void gather_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  for_dtype(p.weight.dtype, [&](auto* weight_type) {
    for_dtype(p.out.dtype, [&](auto* out_type) {
      using W = element<decltype(weight_type)>;
      using Out = element<decltype(out_type)>;
      for (int64_t row = begin; row < end; ++row) {
        const int32_t* ids = p.ids + row * p.top;
        const float* q = p.q + row * p.top;
        auto entry = [&](int64_t i) { return WeightedRow<W>{row_of<W>(p.weight, ids[i]), q[i]}; };
        weighted_rows(p.rest[row], p.mean, p.top, p.width, entry, row_of<Out>(p.out, row));
      }
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
