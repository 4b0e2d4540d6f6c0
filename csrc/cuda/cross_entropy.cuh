// Fused log-softmax cross-entropy: forward (one read), or forward and gradient (one read, one write: the row waits in
// shared memory between its sum and its gradient; rows too long for that are read twice). Never materialised:
// log-probabilities, one-hot rows. Formulas: CrossEntropyParams in common/params.h.
#pragma once

#include "row.cuh"

namespace klflow::cuda {

// The derivative of tanh, without cancellation where it is small.
__device__ __forceinline__ float tanh_slope(float x) {
  const float e = __expf(-2.0f * fabsf(x)), d = 1.0f + e;
  return 4.0f * e / (d * d);
}

// The row waits in shared memory between its two uses, as far past a boundary there as in global memory.
constexpr int kCrossEntropyBytes = kPartialBytes + 16;

// kPlain: integer targets, no label smoothing, no softcap.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(CrossEntropyParams p, bool keep) {
  const Cluster cluster;
  const float uniform = p.label_smoothing / static_cast<float>(p.vocab);
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    const Slice slice = slice_of(p.vocab);  // `column` below is of the slice, j of the row
    const bool soft = !kPlain && p.target.data == nullptr;
    const int64_t token = soft ? -1 : p.target.at(row);
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
    const float own_z = own_weight != 0.0f ? capped(load(p.logits, row, token)) : 0.0f;
    const float row_weight = p.row_weight.at(row, 1.0f);

    ExpSum sum = empty_sum();
    double qw = 0.0, qwz = 0.0;
    const T* logits = row_of<T>(p.logits, row) + slice.begin;
    T* kept = reinterpret_cast<T*>(shared_memory() + kPartialBytes) + past_boundary(logits);
    if constexpr (kPlain) {
      const Interior interior(slice.size);
      const SharedAddress image = shared_address(kept);
      read_interior(logits, interior, [&](int column, const auto& window) {
        float z[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[i] = window.at(i);
        sum.add(z);
        store_image_if(keep, image, column, window);
      });
      if (interior.single >= 0) sum.add(to_float(logits[interior.single]));
      if (keep) store_image_ends(kept, logits, slice.size, interior);
    } else {
      for (int column = kVector * static_cast<int>(threadIdx.x); column < slice.size; column += kVector * kThreads) {
        const Vector<T> raw = load_vector<T>(logits, column, slice.size, from_float<T>(0.0f));
        float z[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          if (keep && column + i < slice.size) kept[column + i] = raw.element[i];
          z[i] = column + i < slice.size ? capped(to_float(raw.element[i])) : -infinity();  // masked after the cap
        }
        sum.add(z);
        if (dense) {
          for (int i = 0; i < kVector && column + i < slice.size; ++i) {
            const double weight = dense_qw(slice.begin + column + i);
            qw += weight;
            if (soft || weight != 0.0) qwz += weight * z[i];  // a masked class of weight 0 counts for nothing
          }
        }
      }
    }
    const ExpSum all = row_exp_sum(sum);
    if (dense) {
      qw = row_sum(qw);
      qwz = row_sum(qwz);
    }
    if (p.loss != nullptr && is_leader()) {
      const double lse = all.total == 0.0f ? -infinity() : all.shift + ::log(static_cast<double>(all.total));
      double loss = qw * lse - qwz + p.z_loss * lse * lse;
      if (own_weight != 0.0f) loss += own_weight * (lse - own_z);  // a class of weight 0 may be masked
      p.loss[row] = !valid ? not_a_number() : ignored ? 0.0f : static_cast<float>(loss * row_weight);
      p.lse[row] = static_cast<float>(lse);
    }
    if (p.dloss.data == nullptr) continue;
    const float scale = ignored ? 0.0f : valid ? p.dloss.at(row) * row_weight : not_a_number();
    const float dlse = p.dlse.at(row), lse = all.shift + logf(all.total);
    const float a = ignored ? dlse : scale * static_cast<float>(qw + own_weight + 2.0 * p.z_loss * lse) + dlse;
    const float share = a / all.total;  // a p_j = share exp(z_j - shift)
    T* grad = row_of<T>(p.grad, row) + slice.begin;
    auto gradient = [&](float z) { return share * ex2_approx((z - all.shift) * kLog2E); };
    if (ignored && dlse == 0.0f) {  // whatever the logits are
      write_row(
          grad, slice.size,
          [](int, float (&v)[kVector]) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) v[i] = 0.0f;
          },
          [](int) { return 0.0f; });
    } else if constexpr (kPlain) {
      auto write = [&](const T* source, auto&& vector) {
        write_row(grad, slice.size, vector, [&](int column) { return gradient(to_float(source[column])); });
      };
      if (keep && past_boundary(grad) == past_boundary(logits)) {
        write(kept, [&](int column, float (&v)[kVector]) {
          const Window<T, 0> window(kept + column);
#pragma unroll
          for (int i = 0; i < kVector; ++i) v[i] = gradient(window.at(i));
        });
      } else {
        const T* source = keep ? kept : logits;
        write(source, [&](int column, float (&v)[kVector]) {
          const Vector<T> raw = load_vector<T>(source, column, slice.size, from_float<T>(0.0f));
#pragma unroll
          for (int i = 0; i < kVector; ++i) v[i] = gradient(to_float(raw.element[i]));
        });
      }
      if (own_weight != 0.0f) {
        __syncthreads();
        const int own = static_cast<int>(token) - slice.begin;
        if (threadIdx.x == 0 && own >= 0 && own < slice.size)
          grad[own] = from_float<T>(gradient(own_z) - scale * own_weight);
      }
    } else {
      const T* source = keep ? kept : logits;
      store_row(grad, slice.size, [&](int column, float (&v)[kVector]) {
        const Vector<T> raw = load_vector<T>(source, column, slice.size, from_float<T>(0.0f));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int j = slice.begin + column + i;
          v[i] = 0.0f;
          if (column + i >= 0 && column + i < slice.size) {
            v[i] = gradient(capped(to_float(raw.element[i])));
            if (dense) v[i] -= scale * dense_qw(j);
            if (j == token) v[i] -= scale * own_weight;
            if (p.softcap > 0.0f) v[i] *= tanh_slope(to_float(raw.element[i]) / p.softcap);
          }
        }
      });
    }
    __syncthreads();  // the next row writes what was read here
  }
}

}  // namespace klflow::cuda
