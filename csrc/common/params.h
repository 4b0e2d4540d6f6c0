// What each op is given, on every backend: raw pointers, strides and scalars, already checked by csrc/ops.
// Rows are positions (batch x length, flattened). Row strides are in elements; the simplex axis has stride 1.
// A null pointer is an absent argument. Structs are plain data, so tests can fill them from ctypes.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace klflow {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// One row of the simplex axis per position.
struct Rows {
  void* data;      // base of row 0
  int64_t stride;  // elements between rows
  int32_t dtype;   // DType
  int32_t unused;
};

// Integer token ids, one per row: int64 or int32.
struct Tokens {
  const void* data;
  int64_t stride;
  int32_t is_int32;
  int32_t unused;

  KLFLOW_HD int64_t at(int64_t row, int64_t slot = 0) const {
    const int64_t i = row * stride + slot;
    return is_int32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

// One float32 per row; stride 0 broadcasts.
struct Scalars {
  const float* data;
  int64_t stride;

  KLFLOW_HD float at(int64_t row, float absent = 0.0f) const { return data != nullptr ? data[row * stride] : absent; }
};

// The noise state of each row, int64: (seed, step) with stride 0 for all rows or with stride 2 for each row, whose row
// of the noise contract is the row of the call; or (seed, step, row) with stride 3.
struct Rng {
  const int64_t* data;
  int64_t stride;
  int64_t row_offset;  // added to the row of the call

  struct State {
    uint64_t seed;
    int64_t step, row;
  };
  KLFLOW_HD State at(int64_t row) const {
    const int64_t* state = data + row * stride;
    return {static_cast<uint64_t>(state[0]), state[1], stride == 3 ? state[2] : row + row_offset};
  }
};

// Rows that are known at every t: flags (bool) and their tokens. flags == null: no row is given.
struct Given {
  const uint8_t* flags;
  int64_t stride;
  Tokens known;

  KLFLOW_HD bool at(int64_t row) const { return flags != nullptr && flags[row * stride]; }
};

// x_t = softmax((1 - t) log x_0 + t log x_1), x_0 ~ Dirichlet(1) from the noise contract. c = log(V / beta - V + 1).
struct NoiseInterpolateParams {
  int64_t rows, vocab;
  Tokens target;
  Scalars t;
  Rng rng;
  Given given;  // known is unused: a given row is onehot(target)
  float c;
  int32_t log;  // write log x_t
  Rows out;
};

// softmax((1 - t) log_x0 + t log_x1); log_x1.data == null: log_x1 is c onehot(target).
struct LogitInterpolateParams {
  int64_t rows, vocab;
  Rows log_x0, log_x1;
  Tokens target;
  Scalars t;
  float c;
  int32_t log;
  Rows out;
};

// loss_n = row_weight_n (sum_j q_nj w_j (lse_n - z_nj) + z_loss lse_n^2), z = softcap(logits), lse = logsumexp z,
// q = (1 - label_smoothing) onehot(target) + label_smoothing / V (or, with soft targets, the same mix of soft).
struct CrossEntropyParams {
  int64_t rows, vocab;
  Rows logits;
  Tokens target;        // data == null: soft targets
  Rows soft;            // (rows, V) probabilities
  const float* weight;  // (V,) class weights w, or null (ones)
  Scalars row_weight;   // or null (ones)
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap == 0: none
  float* loss;                             // (rows,) contiguous, or null: only the gradient is wanted
  float* lse;                              // (rows,) contiguous: written where loss is
  Scalars dloss;  // (rows,) upstream gradient of loss; null: no gradient is computed (forward only)
  Scalars dlse;   // upstream gradient of lse, or null
  Rows grad;      // d/dlogits; may be the logits themselves (in place)
};

// token ~ softmax(top-k of logits / temperature), restricted to the smallest set of mass >= top_p; k = 1 is argmax.
// Temperature and top_p may differ from row to row.
struct TopkSampleParams {
  int64_t rows, vocab, k;
  Rows logits;
  Scalars temperature, top_p;
  Rng rng;
  Given given;      // given rows take the known token (log-probability 0)
  int64_t* token;   // (rows,) contiguous; -1 for a row that holds a NaN or nothing above -inf
  float* log_prob;  // (rows,) contiguous, or null
};

// topk_sample, then noise_interpolate of the drawn token at t_next. A row whose token is -1 gets NaN.
struct TopkRenoiseParams {
  TopkSampleParams sample;
  Scalars t_next;
  float c;
  Rows out;
};

// p = softmax(logits / temperature); l = (1 - rate) log_x + rate c p; log_x_next = log softmax(l); x_next = softmax(l).
struct EulerStepParams {
  int64_t rows, vocab;
  Rows log_x, logits;
  Scalars rate;
  Scalars temperature;
  float c;
  Given given;      // given rows: x_next = onehot(known), log_x_next = log of it (0 and -inf)
  Rows log_x_next;  // may be log_x itself
  Rows x_next;
};

// mean = sum_j p_j f(log p_j), p = softmax(logits). f is linear between its knots, table[i] at log p = lowest (1 - i /
// (knots - 1)), and table[0] below lowest. A row of which an entry is a NaN or +infinity, or all are -infinity, has no
// mean: NaN.
struct SoftmaxExpectationParams {
  int64_t rows, vocab, knots;
  Rows logits;
  const float* table;  // (tables, knots) contiguous
  int64_t table_rows;  // how many rows, one after the other, share a table
  float scale;         // knots between two log p that are 1 apart: (knots - 1) / -lowest
  float* mean;         // (rows,) contiguous
  float* lse;          // (rows,) contiguous
};

// Columns [column, column + columns) of the rows that noise_embedding multiplies by the weight, from in-kernel noise.
// log_prior == null, the simplex form, not normalised: y_j = E_j^(1 - t) exp(t c [j = k]); sum += sum_j y_j over the
// tile. Otherwise the posterior form, normalised by the stats of the posterior: q_j = exp(z_j - shift) / total, or its
// logarithm. A given row is onehot(target), with a sum of 1.
struct NoiseTileParams {
  int64_t rows, vocab, column, columns;  // column: a multiple of 4
  Tokens target;
  Scalars t;
  Rng rng;
  Given given;  // known is unused
  float c;
  const float* log_prior;  // (V,) or null
  const float* stats;      // (rows, 3) contiguous, written by the posterior op: posterior form only
  int32_t log;             // write log q: posterior form only
  double* sum;             // (rows,) contiguous: simplex form only
  Rows out;                // (rows, columns)
};

// The posterior of each token given its own noisy row, q = softmax(z), z_j = log_prior_j + e_j, with the evidence
// e_j = -V log(1 - (1 - e^-s) u_j), u = softmax(m), s = c t / (1 - t). Where m = log x_t / (1 - t) comes from:
// - the noise and a target: m_j = log E_j + s [j = k]. A given row, and one at t = 1, is onehot(k).
// - the noise and boosts: m_j = log E_j + sum_i boost_i [target_i = j] over the slots of the row. A given row is
//   onehot(target_0). Boosts beyond +-60 count as +-60.
// - a dense state: m = log_x / (1 - t). A row whose only entry above -infinity is k, and the largest entry of one at
//   t = 1, is onehot(k).
// With E_j = e^m_j, S their sum and k the largest (the target, the largest boosted column, or another where that has
// more than a 64th of S), the terms are u_j = E_j / S and, without cancellation, 1 - (1 - e^-s) u_k = (the sum of the
// other E_j + e^-s E_k) / S. The `top` largest q (ties to the lower column), in ascending order of column, and the mass
// of all the others. The other ids of a onehot row are the lowest columns, with q = 0.
struct PosteriorParams {
  int64_t rows, vocab, top;  // top == 0: only the stats
  Rows log_x;                // (rows, V); data == null: from the noise
  Tokens target;             // (rows, slots), slots contiguous; with boosts, -1 is an unused slot
  int64_t slots;             // 1 without boosts
  const float* boost;        // (rows, slots) contiguous, or null
  Scalars t;
  Rng rng;
  Given given;  // known is unused
  float c;
  const float* log_prior;  // (V,)
  int32_t* ids;            // (rows, top) contiguous
  float* q;                // (rows, top) contiguous
  float* rest;             // (rows,) contiguous
  float* stats;    // of a target's rows, (rows, 3) contiguous: sum_j E_j of the noise alone, shift = max_j z_j, total =
                   // sum_j exp(z_j - shift); or null. Not S: e_k needs S / sum_j E_j to a part in V, so who reads the
                   // stats makes E_k again. Of a onehot row, whose E are not made: (0, 0, 1)
  float* scratch;  // CUDA: posterior_scratch_rows rows of float32, or null where shared memory holds a row
};

// out_n = sum_i q_ni weight[ids_ni] + rest_n mean: the embedding of sparse rows.
struct GatherRowsParams {
  int64_t rows, top, width;
  const int32_t* ids;  // (rows, top) contiguous
  const float* q;      // (rows, top) contiguous
  const float* rest;   // (rows,) contiguous
  const float* mean;   // (width,)
  Rows weight;         // (V, width)
  Rows out;            // (rows, width)
};

// Its gradient, every row of dweight written once: dweight_v = prior_v g + sum of q_ni dout_n over the pairs (n, i)
// with ids_ni = v, in the order they are listed in, g = sum_n rest_n dout_n.
struct ScatterRowsParams {
  int64_t pairs, top, vocab, width;
  const int32_t* order;   // (pairs,): n * top + i, grouped by token, ascending within a token
  const int64_t* starts;  // (V + 1,): where each token's group begins
  const float* q;         // (rows, top) contiguous
  const float* prior;     // (V,)
  const float* g;         // (width,)
  Rows dout;              // (rows, width)
  Rows dweight;           // (V, width) float32
};

}  // namespace klflow
