// The CPU ops and how one of the three instruction sets is chosen at run time. Each op of cpu/<op>.cpp handles a range
// of rows; dispatch.cpp splits the rows over torch's threads.
#pragma once

#include "../common/ops.h"

namespace klflow {

#define KLFLOW_DECLARE(op, Params) void op(const Params& p, int64_t begin, int64_t end);
namespace baseline {
KLFLOW_OPS(KLFLOW_DECLARE)
}
#if defined(__x86_64__)
namespace avx2 {
KLFLOW_OPS(KLFLOW_DECLARE)
}
namespace avx512 {
KLFLOW_OPS(KLFLOW_DECLARE)
}
#endif
#undef KLFLOW_DECLARE

namespace cpu {
#define KLFLOW_DECLARE(op, Params) void op(const Params& p);
KLFLOW_OPS(KLFLOW_DECLARE)
#undef KLFLOW_DECLARE

// What an op's range counts.
template <class P>
int64_t rows_of(const P& p) {
  return p.rows;
}
inline int64_t rows_of(const TopkRenoiseParams& p) { return p.sample.rows; }
// Tokens differ in how many pairs they have: the range that is split has a unit for each pair and for each token.
inline int64_t rows_of(const ScatterRowsParams& p) { return p.pairs + p.vocab; }

const char* capability();         // "baseline", "avx2" or "avx512": what runs
const char* capability_reason();  // why not more, or ""
}  // namespace cpu

}  // namespace klflow
