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
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const Slice slice = slice_of(p.vocab);  // `column` below is of the slice, j of the row
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
    // Read before any barrier of the sums, so before an in-place gradient overwrites it.
    const float own_z = hard && p.loss != nullptr ? capped(load(p.logits, row, token)) : 0.0f;
    const float row_weight = scalar_at(p.row_weight, row, 1.0f);

    float lse = p.loss == nullptr ? p.lse[row] : 0.0f;
    double qw = 0.0;
    if (p.loss != nullptr || dense) {
      ExpSum sum = empty_sum();
      double qwz = 0.0;
      const T* logits = row_of<T>(p.logits, row) + slice.begin;
      for (int column = kVector * static_cast<int>(threadIdx.x); column < slice.size; column += kVector * kThreads) {
        const Vector<T> raw = load_vector<T>(logits, column, slice.size, from_float<T>(0.0f));
        if (keep) store_aligned(kept + column, raw);
        float z[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[i] = capped(to_float(raw.element[i]));
        if (column + kVector > slice.size) {  // masked after the cap
#pragma unroll
          for (int i = 0; i < kVector; ++i) z[i] = column + i < slice.size ? z[i] : -infinity();
        }
        sum.add(z);
        if (dense) {
          for (int i = 0; i < kVector && column + i < slice.size; ++i) {
            const double weight = dense_qw(slice.begin + column + i);
            qw += weight;
            qwz += weight * z[i];
          }
        }
      }
      if (p.loss != nullptr) lse = row_lse(sum);
      if (dense) {
        qw = row_sum(qw);
        qwz = row_sum(qwz);
      }
      if (p.loss != nullptr && is_leader()) {
        double loss = qw * lse - qwz + static_cast<double>(p.z_loss) * lse * lse;
        if (hard) loss += own_weight * (static_cast<double>(lse) - own_z);
        p.loss[row] = !valid ? not_a_number() : ignored ? 0.0f : static_cast<float>(loss * row_weight);
        p.lse[row] = lse;
      }
    }
    if (p.dloss.data == nullptr) continue;
    const float scale = ignored ? 0.0f : valid ? scalar_at(p.dloss, row, 0.0f) * row_weight : not_a_number();
    const float dlse = scalar_at(p.dlse, row, 0.0f);
    const float a = ignored ? dlse : scale * static_cast<float>(qw + own_weight + 2.0 * p.z_loss * lse) + dlse;
    const bool zero = ignored && dlse == 0.0f;
    const T* source = keep ? kept : row_of<T>(p.logits, row) + slice.begin;
    store_row(row_of<T>(p.grad, row) + slice.begin, slice.size, [&](int column, float (&v)[kVector]) {
      const Vector<T> raw = load_vector<T>(source, column, slice.size, from_float<T>(0.0f));
      if (kPlain) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] = zero ? 0.0f : a * __expf(to_float(raw.element[i]) - lse);
        const int own = static_cast<int>(token) - slice.begin - column;
        if (own >= 0 && own < kVector) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) v[i] -= i == own ? scale * own_weight : 0.0f;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int j = slice.begin + column + i;
          float gradient = 0.0f;
          if (!zero && column + i >= 0 && column + i < slice.size) {
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
