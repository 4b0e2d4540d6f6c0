// What noise_embedding (klflow_ext/ops/embedding.py) is made of: noise_tile makes columns of the noisy rows or of their
// posterior; gather_rows embeds sparse rows, and scatter_rows, over the pairs as group_by_token sorts them, is its
// gradient.
#include <algorithm>
#include <vector>

#include "run.h"

namespace klflow {
namespace {

void noise_tile(Tensor target, Tensor t, Tensor rng, OptionalTensor given, OptionalTensor log_prior,
                OptionalTensor stats, double beta, int64_t row_offset, int64_t vocab, int64_t column, bool log,
                OptionalTensor sum, Tensor out) {
  KLFLOW_CHECK_DEVICES(target, t, rng, given, log_prior, stats, sum, out);
  check(out.dim() == 2, "out: must have two axes");
  NoiseTileParams p{};
  p.rows = out.size(0);
  p.vocab = vocab;
  p.column = column;
  p.columns = out.size(1);
  check(column >= 0 && column % 4 == 0 && column + p.columns <= vocab, "column: ", column,
        " is not a multiple of 4 whose tile ends within V = ", vocab);
  p.target = tokens_of(target, p.rows, "target");
  p.t = scalars_of(t, p.rows, "t");
  p.rng = rng_of(rng, p.rows, row_offset);
  p.given = given_of(given, std::nullopt, p.rows);
  p.c = checked_gap(beta, vocab);
  check(log_prior.has_value() == stats.has_value() && log_prior.has_value() != sum.has_value(),
        "needed are either log_prior and stats, or sum");
  check(!log || log_prior.has_value(), "log: allowed with log_prior only");
  p.log = log;
  if (log_prior.has_value()) {
    p.log_prior = log_prior_of(*log_prior, vocab);
    p.stats = matrix_of<float>(*stats, p.rows, 3, ScalarType::Float, "stats");
  } else {
    check(sum->dim() == 1 && sum->size(0) == p.rows && sum->scalar_type() == ScalarType::Double && sum->is_contiguous(),
          "sum: must be contiguous float64 of shape (", p.rows, ",)");
    p.sum = static_cast<double*>(sum->data_ptr());
  }
  p.out = rows_of(out, p.rows, p.columns, "out");
  if (p.rows == 0 || p.columns == 0) return;
  if (out.is_cpu()) check_targets(p.target, p.rows, vocab, "target", nullptr, nullptr);
  KLFLOW_RUN(noise_tile, p, out);
}
KLFLOW_OPERATOR(noise_tile,
                "(Tensor target, Tensor t, Tensor rng, Tensor? given, Tensor? log_prior, Tensor? stats, float beta, "
                "SymInt row_offset, int vocab, int column, bool log, Tensor(a!)? sum, Tensor(b!) out) -> ()")

void gather_rows(Tensor ids, Tensor q, Tensor rest, Tensor weight, Tensor mean, Tensor out) {
  KLFLOW_CHECK_DEVICES(ids, q, rest, weight, mean, out);
  check(ids.dim() == 2 && weight.dim() == 2, "ids, weight: must have two axes");
  GatherRowsParams p{};
  p.rows = ids.size(0);
  p.top = ids.size(1);
  p.width = weight.size(1);
  p.ids = matrix_of<int32_t>(ids, p.rows, p.top, ScalarType::Int, "ids");
  p.q = matrix_of<float>(q, p.rows, p.top, ScalarType::Float, "q");
  p.rest = vector_of(rest, p.rows, "rest");
  p.mean = vector_of(mean, p.width, "mean");
  p.weight = rows_of(weight, weight.size(0), p.width, "weight");
  p.out = rows_of(out, p.rows, p.width, "out");
  if (out.is_cpu()) check_targets({p.ids, 1, 1, 0}, p.rows * p.top, weight.size(0), "ids.flatten()", nullptr, nullptr);
  if (p.rows > 0) KLFLOW_RUN(gather_rows, p, out);
}
KLFLOW_OPERATOR(gather_rows, "(Tensor ids, Tensor q, Tensor rest, Tensor weight, Tensor mean, Tensor(a!) out) -> ()")

// order holds them as int32.
void check_pairs(int64_t pairs) {
  check(pairs < int64_t{1} << 31, "ids: ", pairs, " entries, allowed are fewer than 2^31");
}

void scatter_rows(Tensor order, Tensor starts, Tensor q, Tensor prior, Tensor g, Tensor dout, Tensor dweight) {
  KLFLOW_CHECK_DEVICES(order, starts, q, prior, g, dout, dweight);
  check(q.dim() == 2 && dweight.dim() == 2, "q, dweight: must have two axes");
  ScatterRowsParams p{};
  const int64_t rows = q.size(0);
  p.top = q.size(1);
  p.pairs = rows * p.top;
  check_pairs(p.pairs);
  p.vocab = dweight.size(0);
  p.width = dweight.size(1);
  check(order.dim() == 1 && order.size(0) == p.pairs && order.scalar_type() == ScalarType::Int && order.is_contiguous(),
        "order: must be contiguous int32 of shape (", p.pairs, ",)");
  p.order = static_cast<const int32_t*>(order.data_ptr());
  p.starts = token_vector_of(starts, p.vocab + 1, "starts");
  p.q = matrix_of<float>(q, rows, p.top, ScalarType::Float, "q");
  p.prior = vector_of(prior, p.vocab, "prior");
  p.g = vector_of(g, p.width, "g");
  p.dout = rows_of(dout, rows, p.width, "dout");
  p.dweight = rows_of(dweight, p.vocab, p.width, "dweight");
  check(p.dweight.dtype == kFloat32, "dweight: dtype must be float32");
  prefer_huge_pages(dweight);
  KLFLOW_RUN(scatter_rows, p, dweight);
}
KLFLOW_OPERATOR(
    scatter_rows,
    "(Tensor order, Tensor starts, Tensor q, Tensor prior, Tensor g, Tensor dout, Tensor(a!) dweight) -> ()")

// order: the pairs n * top + i sorted by ids_ni, stable; starts: where each token's group begins. A counting sort; on
// CUDA torch.sort serves.
void group_by_token(Tensor ids, int64_t vocab, Tensor order, Tensor starts) {
  KLFLOW_CHECK_DEVICES(ids, order, starts);
  check(ids.dim() == 2, "ids: must have two axes");
  const int64_t pairs = ids.size(0) * ids.size(1);
  check_pairs(pairs);
  const int32_t* id = matrix_of<int32_t>(ids, ids.size(0), ids.size(1), ScalarType::Int, "ids");
  check(order.dim() == 1 && order.size(0) == pairs && order.scalar_type() == ScalarType::Int && order.is_contiguous(),
        "order: must be contiguous int32 of shape (", pairs, ",)");
  int32_t* out = static_cast<int32_t*>(order.data_ptr());
  int64_t* start = token_vector_of(starts, vocab + 1, "starts");
  std::vector<int32_t> next(vocab + 1);
  for (int64_t i = 0; i < pairs; ++i) {
    check(id[i] >= 0 && id[i] < vocab, "ids: holds ", id[i], ", outside [0, ", vocab, ")");
    ++next[id[i] + 1];
  }
  for (int64_t v = 0; v < vocab; ++v) next[v + 1] += next[v];
  std::copy(next.begin(), next.end(), start);
  for (int64_t i = 0; i < pairs; ++i) out[next[id[i]]++] = static_cast<int32_t>(i);
}
KLFLOW_CPU_OPERATOR(group_by_token, "(Tensor ids, int vocab, Tensor(a!) order, Tensor(b!) starts) -> ()")

}  // namespace
}  // namespace klflow
