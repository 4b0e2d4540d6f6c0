// What each op is given, on every backend: raw pointers, strides and scalars, already checked by ops.cpp.
// Rows are positions (batch x length, flattened). Row strides are in elements; the simplex axis has stride 1.
// A null pointer is an absent argument. Structs are plain data, so tests can fill them from ctypes.
#pragma once

#include <cstdint>

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
};

// One float32 per row; stride 0 broadcasts.
struct Scalars {
  const float* data;
  int64_t stride;
};

// The noise state (seed, step) of each row: int64 pairs; stride 0 is one pair for all rows, 2 one pair per row.
struct Rng {
  const int64_t* data;
  int64_t stride;
  int64_t row_offset;  // added to the local row to give the global row of the noise contract
};

// Rows that are known at every t: flags (bool) and their tokens. flags == null: no row is given.
struct Given {
  const uint8_t* flags;
  int64_t stride;
  Tokens known;
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
  float* loss;                             // (rows,) contiguous; null in the backward
  float* lse;                              // (rows,) contiguous: written by the forward, read by the backward
  Scalars dloss;  // (rows,) upstream gradient of loss; null: no gradient is computed (forward only)
  Scalars dlse;   // upstream gradient of lse, or null
  Rows grad;      // d/dlogits; may be the logits themselves (in place)
};

// token ~ softmax(top-k of logits / temperature), restricted to the smallest set of mass >= top_p; k = 1 is argmax.
struct TopkSampleParams {
  int64_t rows, vocab, k;
  Rows logits;
  float temperature, top_p;
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
  float temperature, c;
  Given given;      // given rows: x_next = onehot(known), log_x_next = log of it (0 and -inf)
  Rows log_x_next;  // may be log_x itself
  Rows x_next;
};

}  // namespace klflow
