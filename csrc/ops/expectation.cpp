// softmax_expectation: the mean of a tabulated function of log p.
#include <cmath>

#include "run.h"

namespace klflow {
namespace {

constexpr int64_t kMostKnots = 4096;  // of a table, which must fit into the caches

void softmax_expectation(Tensor logits, Tensor table, double lowest, Tensor mean, Tensor lse) {
  KLFLOW_CHECK_DEVICES(logits, table, mean, lse);
  check(logits.dim() == 2, "logits: must have two axes");
  check(table.dim() == 2, "table: must have two axes");
  SoftmaxExpectationParams p{};
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.logits = rows_of(logits, p.rows, p.vocab, "logits");
  const int64_t tables = table.size(0);
  p.knots = table.size(1);
  check(p.knots >= 2 && p.knots <= kMostKnots, "table: ", p.knots, " knots, allowed are 2 to ", kMostKnots);
  p.table = matrix_of<float>(table, tables, p.knots, ScalarType::Float, "table");
  check(tables > 0 ? p.rows % tables == 0 : p.rows == 0, "table: ", tables, " tables do not divide ", p.rows, " rows");
  p.table_rows = tables > 0 ? p.rows / tables : 0;
  p.scale = static_cast<float>((p.knots - 1) / -lowest);
  check(lowest < 0.0 && std::isfinite(p.scale) && p.scale > 0.0f, "lowest: ", lowest, " is not a negative number");
  p.mean = vector_of(mean, p.rows, "mean");
  p.lse = vector_of(lse, p.rows, "lse");
  if (p.rows > 0) KLFLOW_RUN(softmax_expectation, p, logits);
}
KLFLOW_OPERATOR(softmax_expectation,
                "(Tensor logits, Tensor table, float lowest, Tensor(a!) mean, Tensor(b!) lse) -> ()")

}  // namespace
}  // namespace klflow
