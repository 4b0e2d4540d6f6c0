// The SIMT machine as a backend: what its library exports.
#include "../cuda/ops.h"
#include "simt.h"

#define KLFLOW_EXPORT extern "C" __attribute__((visibility("default")))

KLFLOW_EXPORT const klflow::Backend* klflow_backend() {
#define KLFLOW_ENTRY(op, Params) .op = klflow::cuda::op,
  static const klflow::Backend backend = [] {
    klflow::Backend table{KLFLOW_OPS(KLFLOW_ENTRY)};
    table.posterior_scratch_rows = klflow::cuda::posterior_scratch_rows;
    table.posterior_scratch_columns = klflow::cuda::posterior_scratch_columns;
    return table;
  }();
  return &backend;
}
KLFLOW_EXPORT void klflow_simt_seed(uint64_t value) { simt::seed(value); }
KLFLOW_EXPORT void klflow_simt_last_launch(unsigned* cluster, unsigned* shared_bytes) {
  simt::last_launch(*cluster, *shared_bytes);
}
KLFLOW_EXPORT void klflow_simt_device(int clusters, int64_t block_bytes, int64_t processor_bytes) {
  simt::set_device_kind({clusters != 0, block_bytes, processor_bytes});
}
