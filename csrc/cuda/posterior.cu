#include "posterior.cuh"

#include "launch.cuh"
#include "ops.h"

namespace klflow::cuda {

namespace {
Layout posterior_layout(int64_t vocab) { return layout_of(vocab, sizeof(float), kPosteriorBytes); }
}  // namespace

int64_t posterior_scratch_rows(const PosteriorParams& p) {
  constexpr int64_t kMostFloats = int64_t{1} << 26;  // 256 MB, unless V is so large that these are fewer than 16 rows
  if (posterior_layout(p.vocab).keep > 0) return 0;
  const int64_t blocks = std::min(2 * device().processors, std::max<int64_t>(16, kMostFloats / p.vocab));
  return std::min(p.rows, blocks);
}
int64_t posterior_scratch_columns(const PosteriorParams& p) { return scratch_columns(p.vocab); }

const char* posterior(const PosteriorParams& p, void* stream) {
  const Layout layout = posterior_layout(p.vocab);
  auto launch_source = [&](auto source) {
    using Source = decltype(source);
    if (p.scratch == nullptr)
      return launch_rows("posterior", posterior_kernel<false, Source>, p, p.rows, layout, stream, kPosteriorBytes);
    const int64_t blocks = posterior_scratch_rows(p);
    return launch("posterior", posterior_kernel<true, Source>, p, false, blocks, 1, kPosteriorBytes, stream);
  };
  if (p.log_x.data != nullptr)
    return for_dtype(p.log_x.dtype, [&](auto type) { return launch_source(StateSource<decltype(type)>{}); });
  if (p.boost != nullptr) return launch_source(BoostedSource{});
  return launch_source(NoiseSource{});
}

}  // namespace klflow::cuda
