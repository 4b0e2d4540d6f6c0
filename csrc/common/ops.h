// The operators that have kernels, each with what it is given: the one list that the declarations and tables of every
// backend are made from. X(op, Params).
#pragma once

#include "params.h"

#define KLFLOW_OPS(X)                              \
  X(noise_interpolate, NoiseInterpolateParams)     \
  X(logit_interpolate, LogitInterpolateParams)     \
  X(cross_entropy, CrossEntropyParams)             \
  X(topk_sample, TopkSampleParams)                 \
  X(topk_renoise, TopkRenoiseParams)               \
  X(euler_step, EulerStepParams)                   \
  X(softmax_expectation, SoftmaxExpectationParams) \
  X(noise_tile, NoiseTileParams)                   \
  X(posterior, PosteriorParams)                    \
  X(gather_rows, GatherRowsParams)                 \
  X(scatter_rows, ScatterRowsParams)
