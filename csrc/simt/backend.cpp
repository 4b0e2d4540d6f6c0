#include "../cuda/backend.h"

#include "../cuda/launch.h"
#include "simt.h"

#define KLFLOW_EXPORT extern "C" __attribute__((visibility("default")))

KLFLOW_EXPORT const klflow::Backend* klflow_backend() {
  using namespace klflow::cuda;
  static const klflow::Backend backend{noise_interpolate,
                                       logit_interpolate,
                                       cross_entropy,
                                       topk_sample,
                                       topk_renoise,
                                       euler_step,
                                       noise_tile,
                                       posterior,
                                       gather_rows,
                                       scatter_rows,
                                       posterior_scratch_rows,
                                       posterior_scratch_columns};
  return &backend;
}
KLFLOW_EXPORT void klflow_simt_seed(uint64_t value) { simt::seed(value); }
KLFLOW_EXPORT void klflow_simt_last_launch(unsigned* cluster, unsigned* shared_bytes) {
  simt::last_launch(*cluster, *shared_bytes);
}
KLFLOW_EXPORT void klflow_simt_device(int clusters, int64_t block_bytes, int64_t processor_bytes) {
  simt::set_device_kind({clusters != 0, block_bytes, processor_bytes});
}
