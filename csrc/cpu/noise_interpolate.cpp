// x_t = softmax((1 - t) log x_0 + t log x_1) with the noise made in registers: x_t[j] is proportional to
// E_j^(1 - t) exp(t c [j = k]). Never built: x_0, log x_0, l_t. Each row is written once, while the next is made; bound
// by the arithmetic.
#include "dispatch.h"
#include "row.h"

namespace klflow::KLFLOW_ISA {

void noise_interpolate(const NoiseInterpolateParams& p, int64_t begin, int64_t end) {
  for_dtype(p.out.dtype, [&](auto* type) {
    using T = element<decltype(type)>;
    NoiseRows<T> noise(p.rows, p.vocab, p.c, p.log);
    for (int64_t row = begin; row < end; ++row) {
      T* out = row_of<T>(p.out, row);
      const int64_t token = p.target.at(row);
      if (p.given.at(row)) {
        store_onehot(out, p.vocab, token, p.log);
        continue;
      }
      noise.add(philox_key(p.rng, row, kSimplexNoise), token, p.t.at(row), out);
    }
  });
}

}  // namespace klflow::KLFLOW_ISA
