// Fused log-softmax cross-entropy: forward (one read), forward + gradient (one read, one write: the row waits in shared
// memory), or gradient from the saved lse (one read, one write). Never materialised: log-probabilities, one-hot rows.
// Formulas: CrossEntropyParams in common/params.h.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

// kPlain: integer targets, no label smoothing, no softcap.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(CrossEntropyParams p, bool keep) {
  T* kept = keep ? reinterpret_cast<T*>(shared_memory() + kPartialBytes) : nullptr;  // the row, between its two uses
  const float uniform = p.label_smoothing / static_cast<float>(p.vocab);
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const bool soft = !kPlain && p.target.data == nullptr;
    const int64_t token = soft ? -1 : token_at(p.target, row);
    const bool ignored = !soft && token == p.ignore_index;
    const bool valid = soft || ignored || (token >= 0 && token < p.vocab);
    const bool hard = !soft && !ignored && valid;
    const bool dense = !kPlain && !ignored && (soft || p.label_smoothing > 0.0f);
    auto capped = [&](float x) { return !kPlain && p.softcap > 0.0f ? p.softcap * tanhf(x / p.softcap) : x; };
    auto class_weight = [&](int64_t j) { return p.weight != nullptr ? p.weight[j] : 1.0f; };
    auto dense_qw = [&](int64_t j) {  // q_j w_j without the hard target's own term
      const float q = soft ? uniform + load(p.soft, row, j) * (1.0f - p.label_smoothing) : uniform;
      return q * class_weight(j);
    };
    const float own_weight = hard ? (1.0f - p.label_smoothing) * class_weight(token) : 0.0f;
    const float own_z = hard ? capped(load(p.logits, row, token)) : 0.0f;
    const float row_weight = scalar_at(p.row_weight, row, 1.0f);

    float lse = p.loss == nullptr ? p.lse[row] : 0.0f;
    double qw = 0.0;
    if (p.loss != nullptr || dense) {
      ExpSum sum = empty_sum();
      double qwz = 0.0;
      const T* logits = row_of<T>(p.logits, row);
      for (int64_t column = kVector * static_cast<int64_t>(threadIdx.x); column < p.vocab;
           column += kVector * kThreads) {
        const Vector<T> raw = load_vector<T>(logits, column, p.vocab, from_float<T>(0.0f));
        if (keep) *reinterpret_cast<Vector<T>*>(kept + column) = raw;
        float z[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[i] = capped(to_float(raw.element[i]));
        if (column + kVector > p.vocab) {  // masked after the cap
#pragma unroll
          for (int i = 0; i < kVector; ++i) z[i] = column + i < p.vocab ? z[i] : -infinity();
        }
        sum.add(z);
        if (dense) {
          for (int i = 0; i < kVector && column + i < p.vocab; ++i) {
            const double weight = dense_qw(column + i);
            qw += weight;
            qwz += weight * z[i];
          }
        }
      }
      if (p.loss != nullptr) lse = block_lse(sum);
      if (dense) {
        qw = block_sum(qw);
        qwz = block_sum(qwz);
      }
      if (p.loss != nullptr && threadIdx.x == 0) {
        double loss = qw * lse - qwz + static_cast<double>(p.z_loss) * lse * lse;
        if (hard) loss += own_weight * (static_cast<double>(lse) - own_z);
        p.loss[row] = !valid ? not_a_number() : ignored ? 0.0f : static_cast<float>(loss * row_weight);
        p.lse[row] = lse;
      }
    }
    if (p.dloss.data == nullptr) continue;
    __syncthreads();  // own_z has been read everywhere before an in-place gradient overwrites it
    const float scale = ignored ? 0.0f : valid ? scalar_at(p.dloss, row, 0.0f) * row_weight : not_a_number();
    const float dlse = scalar_at(p.dlse, row, 0.0f);
    const float a = ignored ? dlse : scale * static_cast<float>(qw + own_weight + 2.0 * p.z_loss * lse) + dlse;
    const bool zero = ignored && dlse == 0.0f;
    const T* source = keep ? kept : row_of<T>(p.logits, row);
    store_row(row_of<T>(p.grad, row), p.vocab, [&](int64_t column, float (&v)[kVector]) {
      const Vector<T> raw = load_vector<T>(source, column, p.vocab, from_float<T>(0.0f));
      if (kPlain) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = zero ? 0.0f : a * __expf(to_float(raw.element[i]) - lse);
        const int64_t own = token - column;
        if (own >= 0 && own < kVector) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) v[i] -= i == own ? scale * own_weight : 0.0f;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int64_t j = column + i;
          float gradient = 0.0f;
          if (!zero && j >= 0 && j < p.vocab) {
            const float z = capped(to_float(raw.element[i]));
            gradient = a * __expf(z - lse);
            if (dense) gradient -= scale * dense_qw(j);
            if (j == token) gradient -= scale * own_weight;
            if (p.softcap > 0.0f) gradient *= 1.0f - (z / p.softcap) * (z / p.softcap);
          }
          v[i] = gradient;
        }
      }
    });
    __syncthreads();  // the next row writes what was read here
  }
}

}  // namespace klflow::cuda
