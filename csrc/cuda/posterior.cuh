// The `top` largest entries of each row's posterior and the mass of the others (PosteriorParams in common/params.h). A
// cluster of blocks handles a row.
// 1. The row's E, from the noise contract or a dense state, is made once and summed, and waits in shared memory as
//    float32, or in the block's row of a scratch tensor where shared memory is too small for it: posterior_source.cuh.
// 2. There it becomes z_j = log q_j + const, of which each thread notes the largest of two groups of columns.
// 3. Selection: that bounds the top-th z from below; a radix descent over the few z above the bound finds it exactly:
//    selection.cuh.
// 4. Each thread weighs and counts what is selected of a contiguous piece of the row.
// 5. Prefix sums of the counts give every entry its place in ascending order of column, ties going to the lower column.
// Never materialised: x_t, evidence, q. Bytes: 8 top a row written, a state read; log_prior stays in L2. Bound:
// instructions, about 40 an element, 18 of them the noise.
#pragma once

#include "posterior_source.cuh"

namespace klflow::cuda {

// Shared memory: the partial results, what selection needs, the kept slice.
constexpr int kPosteriorBytes = kPartialBytes + sizeof(SelectionShared);
static_assert(kPosteriorBytes % 16 == 0, "the kept slice is read 16 bytes at a time");

// Columns between the blocks' rows of the scratch tensor.
__host__ __device__ __forceinline__ int64_t scratch_columns(int64_t vocab) {
  return (vocab + kVector - 1) / kVector * kVector;
}

// A row without E: onehot(token), or NaN.
__device__ __forceinline__ void store_plain_row(const PosteriorParams& p, int64_t row, int64_t token, bool valid) {
  if (cluster_rank() != 0) return;
  for (int64_t i = threadIdx.x; i < p.top; i += kThreads) {
    const int64_t id = valid && i == p.top - 1 && token > i ? token : i;
    p.ids[row * p.top + i] = static_cast<int32_t>(id);
    p.q[row * p.top + i] = !valid ? not_a_number() : id == token ? 1.0f : 0.0f;
  }
  if (threadIdx.x != 0) return;
  p.rest[row] = !valid ? not_a_number() : p.top > 0 ? 0.0f : 1.0f;
  if (p.stats != nullptr)
    for (int i = 0; i < 3; ++i) p.stats[3 * row + i] = !valid ? not_a_number() : i == 2 ? 1.0f : 0.0f;
}

// Turns this thread's E into z, own_z in the row's token. maxima: of the thread's two groups of columns; the token
// counts there as if it had no evidence, so for no more than own_z. NaN or infinity where some z is that.
template <bool kLargeW>
__device__ __forceinline__ void make_z(const PosteriorRow& row, const Evidence& evidence, const float* log_prior,
                                       int in_words, float own_z, float (&maxima)[2]) {
  if (row.narrow) {
    for (int column = thread_of_row(); column < row.size; column += kThreads)
      row.kept[column] = evidence.narrow(row.kept[column]) + log_prior[column];
    __syncthreads();
  }
  const bool owns =
      row.own_column >= 0 && row.own_column < row.size && row.own_column % kStride / kQuad * kQuad == row.first;
  if (owns) row.kept[row.own_column] = row.narrow ? log_prior[row.own_column] : 0.0f;
  maxima[0] = own_z < infinity() ? -infinity() : infinity();
  maxima[1] = -infinity();
  auto finish = [&](int column, const float (&z)[kQuad]) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) maxima[i / 2] = max_nan(maxima[i / 2], z[i]);
    store_quad(row.kept + column, z);
  };
  auto posterior = [&](float noise, float prior) {
    return kLargeW ? evidence.any_posterior(noise, prior) : evidence.posterior(noise, prior);
  };
  int column = row.first;
  if (!row.narrow) {
    const int end = in_words - kQuad + 1;
#pragma unroll 2
    for (; column < end; column += kStride) {
      float z[kQuad], prior[kQuad];
      load_quad(row.kept + column, z);
      load_quad(log_prior + column, prior);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) z[i] = posterior(z[i], prior[i]);
      finish(column, z);
    }
  }
#pragma unroll 1
  for (; column < row.size; column += kStride) {
    float z[kQuad];
    load_quad(row.kept + column, z);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (column + i >= row.size)
        z[i] = -infinity();
      else if (!row.narrow)
        z[i] = posterior(z[i], log_prior[column + i]);
    }
    finish(column, z);
  }
  if (owns) row.kept[row.own_column] = own_z;
}

// kScratch: rows wait in the scratch tensor.
template <bool kScratch, class Source>
__global__ void __launch_bounds__(kThreads, 2) posterior_kernel(PosteriorParams p, bool) {
  const Cluster cluster;
  SelectionShared& s = *reinterpret_cast<SelectionShared*>(shared_memory() + kPartialBytes);
  // (A scratch row has no cluster; to say so saves registers here, and costs some of a state.)
  const Slice slice = kScratch && !Source::kDense ? Slice{0, static_cast<int>(p.vocab)} : slice_of(p.vocab);
  const float* log_prior = p.log_prior + slice.begin;
  const int in_words =
      (reinterpret_cast<uintptr_t>(log_prior) & 15) == 0 ? slice.size : 0;  // columns read 16 bytes at a time
  for (int64_t n = first_row(); n < p.rows; n += row_step()) {
    PosteriorRow row;
    row.kept = kScratch ? p.scratch + unhoisted(static_cast<int>(blockIdx.x)) * scratch_columns(p.vocab)
                        : reinterpret_cast<float*>(shared_memory() + kPosteriorBytes);
    row.size = slice.size;
    row.first = kQuad * thread_of_row();
    row.begin = slice.begin;
    row.narrow = !kScratch && p.vocab <= kNarrow;
    row.t = p.t.at(n);
    row.gain = gain_of(row.t, p.c);

    // 1. E and its sum.
    Source source;
    const Start start = source.start(p, n, row);
    const bool valid = row.t >= 0.0f && row.t <= 1.0f && start.valid;
    if (!valid || start.certain) {
      store_plain_row(p, n, row.token, valid);
      continue;
    }
    if (!source.open(p, n, row)) {
      store_plain_row(p, n, -1, false);
      continue;
    }
    double sum = source.sum(p, n, row);
    if (p.stats != nullptr) {
      sum = static_cast<float>(sum);  // as who reads the stats will have it: shift is then the same z again
      if (is_leader()) p.stats[3 * n] = static_cast<float>(sum);
    }

    // 2. z.
    const Evidence evidence(source.split(sum, row.gain), row.gain, p.vocab);
    const float own_z = Source::kBoosted && row.token < 0 ? -infinity() : p.log_prior[row.token] + evidence.own;
    float maxima[2];
    make_z<Source::kLargeW>(row, evidence, log_prior, in_words, own_z, maxima);
    s.clear();
    const float most = row_max(max_nan(maxima[0], maxima[1]));
    if (!(most < infinity())) {  // the prior is no distribution
      store_plain_row(p, n, row.token, false);
      continue;
    }
    const float shift = fmaxf(most, own_z);

    // 3. The top-th largest z.
    const Selected selected = select_top(row, p.top, most, maxima, s);

    // 4. Masses.
    Piece piece;
    const Masses masses = weigh_row(row, selected, shift, piece);
    const double total = masses.selected + masses.rest;
    if (is_leader()) {
      p.rest[n] = static_cast<float>(masses.rest / total);
      if (p.stats != nullptr) {
        p.stats[3 * n + 1] = shift;
        p.stats[3 * n + 2] = static_cast<float>(total);
      }
    }

    // 5. The selected entries.
    if (p.top > 0) store_selected(row, slice.begin, selected, piece, shift, total, p.ids + n * p.top, p.q + n * p.top);
    __syncthreads();  // the next row writes what was read here
  }
}

}  // namespace klflow::cuda
