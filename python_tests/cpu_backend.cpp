// The CPU kernels of one instruction set as a library that stands in for those of klflow_ext (see use_backend), so that
// tests can run them under sanitizers with nothing else rebuilt.
#include "cpu/dispatch.h"
#include "cpu/row.h"
#include "cuda/ops.h"

namespace {

template <class Params, void (*kOp)(const Params&, int64_t, int64_t)>
const char* run(const Params& p, void*) {
  kOp(p, 0, klflow::cpu::rows_of(p));
  return nullptr;
}

}  // namespace

#define KLFLOW_EXPORT extern "C" __attribute__((visibility("default")))

KLFLOW_EXPORT const klflow::Backend* klflow_backend() {
#define KLFLOW_ENTRY(op, Params) .op = run<klflow::Params, klflow::KLFLOW_ISA::op>,
  static const klflow::Backend backend{KLFLOW_OPS(KLFLOW_ENTRY)};
  return &backend;
}
// Reads the last n elements of a row as the kernels do, n being for the caller to get wrong.
KLFLOW_EXPORT float klflow_read(const float* end, int n) { return klflow::KLFLOW_ISA::load_n(end, n, 0.0f)[0]; }
