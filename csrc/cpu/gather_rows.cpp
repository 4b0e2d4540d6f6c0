// out_n = sum_i q_ni weight[ids_ni] + rest_n mean: each row's sum stays in registers over a block of the width. Bound
// by reading rows * top rows of the weight, mostly from cache: the frequent tokens recur.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

void gather_rows(const GatherRowsParams& p, int64_t begin, int64_t end) {
  for_dtype(p.weight.dtype, [&](auto* weight_type) {
    for_dtype(p.out.dtype, [&](auto* out_type) {
      using W = element<decltype(weight_type)>;
      using T = element<decltype(out_type)>;
      for (int64_t row = begin; row < end; ++row) {
        const int32_t* ids = p.ids + row * p.top;
        const float* q = p.q + row * p.top;
        float* sum = scratch_row(p.width);
        for (int64_t d = 0; d < p.width; ++d) sum[d] = p.rest[row] == 0.0f ? 0.0f : p.rest[row] * p.mean[d];
        for (int64_t i = 0; i < p.top; ++i) {
          if (q[i] == 0.0f) continue;
          const W* source = row_of<W>(p.weight, ids[i]);
          for_vectors(p.width, [&](int64_t d, int m) {
            store_n(sum + d, load_n(sum + d, m, 0.0f) + load_n(source + d, m, 0.0f) * q[i], m);
          });
        }
        store_row(row_of<T>(p.out, row), sum, p.width, 1.0f, 0.0f);
      }
    });
  });
}

}  // namespace klflow::KLFLOW_ISA
