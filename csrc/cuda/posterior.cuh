// The `top` largest entries of each row's posterior and the mass of the others (PosteriorParams in common/params.h). A
// cluster of blocks handles a row. The row's E, from the noise contract or a dense state, is made once and summed, and
// waits in shared memory as float32, or in the block's row of a scratch tensor where shared memory is too small for it;
// there it becomes z_j = log q_j + const.
// Selection: the top-th largest of the maxima of small groups of columns bounds the top-th z from below; the few z
// above that bound are queued, and a radix descent over them (over the row, where they overflow the queue) finds the
// top-th z exactly, and how many of its equals belong. Then each thread counts what is selected of a contiguous piece
// of the row, and prefix sums give every entry its place in ascending order of column, ties going to the lower column.
// Never materialised: x_t, evidence, q. Bytes: 8 top a row written, a state read; log_prior stays in L2. Bound:
// instructions, about 50 an element, 21 of them the noise.
#pragma once

#include "evidence.cuh"

namespace klflow::cuda {

constexpr int kQuad = 4;  // columns that a thread handles together: one counter of the noise
constexpr int kBins = 256;
constexpr int kDigits = 4;
constexpr int kQueuedZ = 1024;
constexpr int kGroups = 2 * kThreads;  // of columns: each thread has two
constexpr float kBinsPerNat = 16.0f;   // of the groups' maxima, below the largest

// Shared memory after the partial results; the kept slice follows.
struct PosteriorShared {
  uint32_t counts[kDigits * kBins];  // of each radix digit; before that, the last: of the groups' maxima
  uint32_t queue[kQueuedZ];          // falling bits of z
  uint32_t queued;
  uint32_t unused[3];
};
// Columns between the blocks' rows of the scratch tensor.
__host__ __device__ __forceinline__ int64_t scratch_columns(int64_t vocab) {
  return (vocab + kVector - 1) / kVector * kVector;
}
constexpr int kPosteriorBytes = kPartialBytes + sizeof(PosteriorShared);
static_assert(kPosteriorBytes % 16 == 0, "the kept slice is read 16 bytes at a time");

__device__ __forceinline__ void load_quad(const float* address, float (&x)[kQuad]) {
  const Words16 words = load16(address);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) x[i] = __int_as_float(static_cast<int32_t>(words.w[i]));
}
__device__ __forceinline__ void store_quad(float* address, const float (&x)[kQuad]) {
  store16(address, {{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}});
}

// Larger z have smaller falling bits.
__device__ __forceinline__ uint32_t falling_bits(float z) { return ~ordered_bits(z); }

struct Largest {
  float value;
  __device__ __forceinline__ Largest shuffle_down(int offset) const { return {__shfl_down_sync(~0u, value, offset)}; }
};
__device__ __forceinline__ float row_max(float value) {
  return row_reduce(Largest{value}, [](Largest a, Largest b) { return Largest{fmaxf(a.value, b.value)}; }).value;
}

struct Masses {
  double selected, rest;
  __device__ __forceinline__ Masses shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, selected, offset), __shfl_down_sync(~0u, rest, offset)};
  }
};

// The bin of kBins in which a running count reaches k, what is left of k within it, and what it holds; of this block,
// or (clustered) of the sum over the cluster's blocks. The same in every thread.
struct Bin {
  uint32_t index, left, count;
};
template <bool clustered>
__device__ __forceinline__ Bin find_bin(uint32_t* counts, uint32_t k) {
  constexpr int kOwn = kBins / 32;
  const uint32_t lane = threadIdx.x % 32;
  uint32_t own[kOwn] = {};
  for (uint32_t rank = 0; rank < (clustered ? cluster_size() : 1); ++rank) {
    unsigned char* mine = reinterpret_cast<unsigned char*>(counts + kOwn * lane);
    const unsigned char* theirs = clustered && cluster_size() > 1 ? map_shared(mine, rank) : mine;
#pragma unroll
    for (int part = 0; part < kOwn / 4; ++part) {
      const Words16 words = load16(theirs + 16 * part);
#pragma unroll
      for (int i = 0; i < 4; ++i) own[4 * part + i] += words.w[i];
    }
  }
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += own[i];
  uint32_t before = sum;
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, before, offset);
    if (lane >= offset) before += other;
  }
  before -= sum;
  Bin bin{0, 0, 0};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (before < k && k <= before + own[i]) bin = {kOwn * lane + i, k - before, own[i]};
    before += own[i];
  }
  const int source = __ffs(__ballot_sync(~0u, bin.left > 0)) - 1;
  return {__shfl_sync(~0u, bin.index, source), __shfl_sync(~0u, bin.left, source), __shfl_sync(~0u, bin.count, source)};
}

// The sum of the values of all threads before this one, in order of the cluster's blocks and their threads.
__device__ __forceinline__ uint64_t row_prefix(uint64_t value) {
  uint64_t* partial = reinterpret_cast<uint64_t*>(shared_memory());
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t inclusive = value;
  for (uint32_t offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  __syncthreads();  // the previous reduction's results have been read
  if (lane == 31) partial[warp] = inclusive;
  __syncthreads();
  uint64_t before = inclusive - value;
  for (uint32_t w = 0; w < warp; ++w) before += partial[w];
  if (cluster_size() > 1) {
    unsigned char* slot = shared_memory() + kWarps * kSlotBytes;
    if (threadIdx.x == kThreads - 1) *reinterpret_cast<uint64_t*>(slot) = before + value;
    klflow_cluster_sync();
    for (uint32_t rank = 0; rank < cluster_rank(); ++rank)
      before += *reinterpret_cast<const uint64_t*>(map_shared(slot, rank));
    klflow_cluster_sync();
  }
  return before;
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

// Where a row's E comes from: the noise and a target, the noise and boosts, or a dense state of type T.
struct NoiseSource {
  static constexpr bool kBoosted = false, kDense = false;
  using Type = float;
};
struct BoostedSource {
  static constexpr bool kBoosted = true, kDense = false;
  using Type = float;
};
template <class T>
struct StateSource {
  static constexpr bool kBoosted = false, kDense = true;
  using Type = T;
};

// The largest of the boosted columns; value is +infinity where a slot holds no token or no number.
struct Boosted {
  float value, noise, boost;
  int column;
  __device__ __forceinline__ Boosted shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, value, offset), __shfl_down_sync(~0u, noise, offset),
            __shfl_down_sync(~0u, boost, offset), __shfl_down_sync(~0u, column, offset)};
  }
};
__device__ __forceinline__ Boosted larger(const Boosted& a, const Boosted& b) {
  return a.value > b.value || (a.value == b.value && a.column < b.column) ? a : b;
}
// Calls f(column, E, boost) for this thread's slots of a row; the column is -1 where they hold no token or no number.
template <class F>
__device__ __forceinline__ void each_slot(const PosteriorParams& p, int64_t row, const NoiseKey& key, F&& f) {
  for (int slot = static_cast<int>(threadIdx.x); slot < p.slots; slot += kThreads) {
    const int64_t column = p.target.at(row, slot);
    if (column == -1) continue;
    const float boost = p.boost[row * p.slots + slot];
    if (column < 0 || column >= p.vocab || !(boost == boost))
      f(-1, 0.0f, 0.0f);
    else
      f(static_cast<int>(column), exact_noise(row_noise_words(key, static_cast<int>(column)), column),
        fminf(fmaxf(boost, -kMostBoost), kMostBoost));
  }
}

// The largest entry of a state, the lowest of equals, and how many are above -infinity; value is +infinity where one is
// no number.
struct Peak {
  float value;
  int column;
  uint32_t entries;
  __device__ __forceinline__ Peak shuffle_down(int offset) const {
    return {__shfl_down_sync(~0u, value, offset), __shfl_down_sync(~0u, column, offset),
            __shfl_down_sync(~0u, entries, offset)};
  }
};
__device__ __forceinline__ Peak higher(const Peak& a, const Peak& b) {
  const bool first = a.value > b.value || (a.value == b.value && a.column < b.column);
  return {first ? a.value : b.value, first ? a.column : b.column, a.entries + b.entries};
}

// kScratch: rows wait in the scratch tensor.
template <bool kScratch, class Source>
__global__ void __launch_bounds__(kThreads, 2) posterior_kernel(PosteriorParams p, bool) {
  PosteriorShared& s = *reinterpret_cast<PosteriorShared*>(shared_memory() + kPartialBytes);
  // Columns below are of the slice. (A scratch row has no cluster; to say so saves registers here, and costs some of a
  // state.)
  const Slice slice = kScratch && !Source::kDense ? Slice{0, static_cast<int>(p.vocab)} : slice_of(p.vocab);
  const int size = slice.size, stride = kQuad * kThreads;
  const float* log_prior = p.log_prior + slice.begin;
  const bool narrow = !kScratch && p.vocab <= kNarrow;
  using T = typename Source::Type;
  constexpr bool plain =
      !Source::kBoosted && !Source::kDense;  // noise alone has no large w in a row that is not narrow
  const int in_words =
      (reinterpret_cast<uintptr_t>(log_prior) & 15) == 0 ? size : 0;  // columns read 16 bytes at a time
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    float* kept = kScratch ? p.scratch + unhoisted(static_cast<int>(blockIdx.x)) * scratch_columns(p.vocab)
                           : reinterpret_cast<float*>(shared_memory() + kPosteriorBytes);
    const int first = unhoisted(kQuad * static_cast<int>(threadIdx.x));
    const float t = p.t.at(row), gain = gain_of(t, p.c);
    int token = -1;  // the column whose evidence has no cancellation: the target, the largest boosted or entry
    bool valid = t >= 0.0f && t <= 1.0f, certain = false;
    NoiseKey key{};
    float own_noise = 0.0f, own_boost = gain;
    Peak peak{-infinity(), 0, 0};
    if constexpr (Source::kDense) {
      const T* log_x = row_of<T>(p.log_x, row) + slice.begin;
      for (int column = kVector * static_cast<int>(threadIdx.x); column < size; column += kVector * kThreads) {
        const Vector<T> raw = load_vector<T>(log_x, column, size, from_float<T>(-infinity()));
        float v[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          v[i] = to_float(raw.element[i]);
          if (v[i] > peak.value || !(v[i] == v[i])) {
            peak.value = v[i] == v[i] ? v[i] : infinity();
            peak.column = slice.begin + column + i;
          }
          peak.entries += v[i] > -infinity();
        }
        store_kept(kept, column, v);
      }
      peak = row_reduce(peak, [](const Peak& a, const Peak& b) { return higher(a, b); });
      token = peak.column;
      valid = valid && peak.value > -infinity() && peak.value < infinity();
      certain = t == 1.0f || peak.entries == 1;
    } else {
      const int64_t target = p.target.at(row);
      token = target >= 0 && target < p.vocab ? static_cast<int>(target) : -1;
      certain = p.given.at(row) || (!Source::kBoosted && !(gain <= kMostGain));
      if (!Source::kBoosted || certain) valid = valid && token >= 0;
    }
    if (!valid || certain) {
      store_plain_row(p, row, token, valid);
      continue;
    }
    if constexpr (!Source::kDense) {
      key = noise_key(p.rng, row);
      store_round_keys(key);
    }
    if constexpr (Source::kBoosted) {
      Boosted mine{-infinity(), 0.0f, 0.0f, -1};
      each_slot(p, row, key, [&](int column, float noise, float boost) {
        mine = larger(mine, {column < 0 ? infinity() : noise * expf(boost), noise, boost, column});
      });
      mine = row_reduce<false>(mine, [](const Boosted& a, const Boosted& b) { return larger(a, b); });
      if (!(mine.value < infinity())) {
        store_plain_row(p, row, -1, false);
        continue;
      }
      token = mine.column;
      own_noise = mine.noise;
      own_boost = mine.boost;
    } else if constexpr (!Source::kDense) {
      own_noise = exact_noise(row_noise_words(key, token), token);
    }
    int own_column = token - slice.begin;
    auto holds_own = [&](int column) { return static_cast<uint32_t>(own_column - column) < kQuad; };
    auto noise_at = [&](int column, float (&noise)[kQuad]) {
      const Words4 words = row_noise_words(key, slice.begin + column);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) noise[i] = exponential_noise(words.w[i]);
    };
    const float power = 1.4426950408889634f / (1.0f - t);  // of a state
    auto state_at = [&](int column, float (&e)[kQuad]) {
      load_quad(kept + column, e);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) e[i] = ex2_approx((e[i] - peak.value) * power);
    };

    // E and its sum. In the row's token and beyond the row it does not count.
    double sum = threadIdx.x == 0 && slice.begin == 0 ? expf(own_boost - gain) * own_noise : 0.0;
    auto sum_row = [&](auto&& make) {  // make(column, e), of one column or (not narrow) of a quad
      if (narrow) {
        for (int column = static_cast<int>(threadIdx.x); column < size; column += kThreads) {
          float e[kQuad];
          make(column, e);
          if (column != own_column) sum += e[0];
        }
      } else {
        float partial = 0.0f;
        for (int column = first; column < size; column += stride) {
          float e[kQuad];
          make(column, e);
          if (holds_own(column) || column + kQuad > size) {
#pragma unroll
            for (int i = 0; i < kQuad; ++i) e[i] = column + i < size && column + i != own_column ? e[i] : 0.0f;
          }
          partial += (e[0] + e[1]) + (e[2] + e[3]);
        }
        sum += partial;
      }
    };
    auto make_e = [&](int column, float (&e)[kQuad]) {
      if (narrow) {
        e[0] = Source::kDense ? exp2f((kept[column] - peak.value) * power)
                              : exact_noise(row_noise_words(key, column), column);
        kept[column] = e[0];
      } else {
        if constexpr (Source::kDense)
          state_at(column, e);
        else
          noise_at(column, e);
        store_quad(kept + column, e);
      }
    };
    if constexpr (!Source::kBoosted) {
      sum_row(make_e);
    } else {
      // The boosted columns are taken out, the others summed, and what the boosts make of the columns is added: taken
      // from a sum over all columns, the noise of columns with negative boosts would leave nothing but its rounding.
      for (int column = narrow ? static_cast<int>(threadIdx.x) : first; column < size;
           column += narrow ? kThreads : stride) {
        float e[kQuad];
        make_e(column, e);
      }
      auto each_boosted = [&](auto&& f) {  // f(column of the slice, what its boost makes of it), the row's token aside
        each_slot(p, row, key, [&](int column, float noise, float boost) {
          const int in_slice = column - slice.begin;
          if (column != token && in_slice >= 0 && in_slice < size) f(in_slice, noise * expf(boost));
        });
      };
      __syncthreads();
      each_boosted([&](int column, float) { kept[column] = 0.0f; });
      __syncthreads();
      sum_row([&](int column, float (&e)[kQuad]) {
        if (narrow)
          e[0] = kept[column];
        else
          load_quad(kept + column, e);
      });
      __syncthreads();
      each_boosted([&](int column, float raised) {
        kept[column] = raised;
        sum += raised;
      });
    }
    sum = row_sum(sum);
    if constexpr (Source::kBoosted) {
      const float own_raised = own_noise * expf(own_boost);
      if (lift_of(gain) * kMostNoise > kSeries * (sum + own_raised)) {  // the largest of all may have no boost
        if (threadIdx.x == 0 && own_column >= 0 && own_column < size) kept[own_column] = own_raised;
        __syncthreads();
        Boosted most{-infinity(), 0.0f, 0.0f, -1};
        for (int column = static_cast<int>(threadIdx.x); column < size; column += kThreads)
          most = larger(most, {kept[column], kept[column], 0.0f, slice.begin + column});
        most = row_reduce(most, [](const Boosted& a, const Boosted& b) { return larger(a, b); });
        if (most.value > own_raised || token < 0) {
          token = most.column;
          own_column = most.column - slice.begin;
          own_noise = most.noise;
          own_boost = 0.0f;
        }
        sum = threadIdx.x == 0 && slice.begin == 0 ? expf(own_boost - gain) * own_noise : 0.0;
        for (int column = static_cast<int>(threadIdx.x); column < size; column += kThreads)
          if (column != own_column) sum += kept[column];
        sum = row_sum(sum);
      }
    }
    if (p.stats != nullptr) {
      sum = static_cast<float>(sum);  // as who reads the stats will have it: shift is then the same z again
      if (is_leader()) p.stats[3 * row] = static_cast<float>(sum);
    }
    Split<float> split;
    if constexpr (Source::kDense)
      split = {fmaxf(static_cast<float>(sum) + expf(-gain), 1e-37f), lift_of(gain)};  // 1e-37: e_k is then 85 V
    else
      split = split_of_noise(sum, own_noise, own_boost, gain);
    const Evidence evidence(split, gain, p.vocab);
    const float own_z = Source::kBoosted && token < 0 ? -infinity() : p.log_prior[token] + evidence.own;
    // z from what is kept of E (narrow rows: of z), with own_value in the row's token and -infinity beyond the
    // row.
    auto z_at = [&](int column, float own_value, float (&z)[kQuad]) {
      load_quad(kept + column, z);
      if (!narrow) {
        float prior[kQuad];
        if (column + kQuad <= in_words) {
          load_quad(log_prior + column, prior);
        } else {
#pragma unroll
          for (int i = 0; i < kQuad; ++i) prior[i] = column + i < size ? log_prior[column + i] : -infinity();
        }
#pragma unroll
        for (int i = 0; i < kQuad; ++i)
          z[i] = plain ? evidence.posterior(z[i], prior[i]) : evidence.any_posterior(z[i], prior[i]);
      }
      if (holds_own(column) || column + kQuad > size) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i)
          z[i] = column + i == own_column ? own_value : column + i < size ? z[i] : -infinity();
      }
    };
    if (narrow) {
      for (int column = static_cast<int>(threadIdx.x); column < size; column += kThreads)
        kept[column] = evidence.narrow(kept[column]) + log_prior[column];
      __syncthreads();
    }
    float maxima[2] = {-infinity(), -infinity()};  // of all but the row's token
    bool bad = !(own_z < infinity());
    for (int column = first; column < size; column += stride) {
      float z[kQuad];
      z_at(column, -infinity(), z);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        bad |= !(z[i] < infinity());
        maxima[i / 2] = fmaxf(maxima[i / 2], z[i]);
      }
      if (holds_own(column)) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) z[i] = column + i == own_column ? own_z : z[i];
      }
      store_quad(kept + column, z);
    }
#pragma unroll
    for (int i = 0; i < kDigits * kBins / kThreads; ++i) s.counts[kThreads * i + threadIdx.x] = 0;
    if (threadIdx.x == 0) s.queued = 0;
    const float most = row_max(bad ? infinity() : fmaxf(maxima[0], maxima[1]));
    if (!(most < infinity())) {  // the prior is no distribution
      store_plain_row(p, row, token, false);
      continue;
    }
    const float shift = fmaxf(most, own_z);

    // last: the top-th largest z; wanted: how many of the z equal to it are selected, equals: how many there are.
    float last = infinity();
    uint32_t wanted = 0, equals = 0;
    if (p.top > 0) {
      float bound = -infinity();
      if (p.top <= kGroups) {
        uint32_t* counts = s.counts + (kDigits - 1) * kBins;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float place = (most - maxima[i]) * kBinsPerNat;
          atomicAdd(&counts[place < kBins - 1 ? static_cast<int>(place) : kBins - 1], 1u);
        }
        __syncthreads();
        const uint32_t bin = find_bin<false>(counts, static_cast<uint32_t>(p.top)).index;
        if (bin < kBins - 1) bound = most - (static_cast<float>(bin) + 1.001f) / kBinsPerNat;
        bound = row_max(bound);
        if (threadIdx.x < kBins) counts[threadIdx.x] = 0;
      }
      for (int column = first; column < size; column += stride) {
        float z[kQuad];
        load_quad(kept + column, z);
        if (!(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) >= bound)) continue;
        uint32_t taken = 0;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) taken += z[i] >= bound && column + i < size;
        uint32_t place = atomicAdd(&s.queued, taken);
#pragma unroll
        for (int i = 0; i < kQuad; ++i)
          if (z[i] >= bound && column + i < size && place < kQueuedZ) s.queue[place++] = falling_bits(z[i]);
      }
      __syncthreads();
      const uint32_t queued = s.queued;
      uint32_t prefix = 0;
      wanted = static_cast<uint32_t>(p.top);
      for (int digit = 0; digit < kDigits; ++digit) {
        const int low = 24 - 8 * digit;
        auto count = [&](uint32_t bits) {
          if (digit == 0 || bits >> (low + 8) == prefix) atomicAdd(&s.counts[digit * kBins + (bits >> low & 255)], 1u);
        };
        if (queued <= kQueuedZ) {
          for (uint32_t i = threadIdx.x; i < queued; i += kThreads) count(s.queue[i]);
        } else {
          for (int column = first; column < size; column += stride) {
            float z[kQuad];
            load_quad(kept + column, z);
#pragma unroll
            for (int i = 0; i < kQuad; ++i)
              if (z[i] >= bound && column + i < size) count(falling_bits(z[i]));
          }
        }
        if (cluster_size() > 1)
          klflow_cluster_sync();
        else
          __syncthreads();
        const Bin bin = find_bin<true>(s.counts + digit * kBins, wanted);
        prefix = prefix << 8 | bin.index;
        wanted = bin.left;
        equals = bin.count;
      }
      last = value_of_bits(~prefix);
    } else {
      __syncthreads();  // what is kept is read by other threads
    }

    // Masses, and how many are selected, of a piece of the slice: an odd number of quads, so that the threads of a warp
    // read different banks.
    const int piece = kQuad * (((unhoisted(size) + kQuad - 1) / kQuad + kThreads - 1) / kThreads | 1);
    const int begin = piece * static_cast<int>(threadIdx.x), end = begin + piece < size ? begin + piece : size;
    float selected = 0.0f, rest = 0.0f;
    uint32_t above = 0, equal = 0;
#pragma unroll 1  // registers
    for (int column = begin; column < end; column += kQuad) {
      float z[kQuad], mass[kQuad];
      load_quad(kept + column, z);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) mass[i] = mass_of(z[i], shift);
      if (fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])) >= last) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          if (z[i] > last) {
            selected += mass[i];
            ++above;
          } else if (z[i] < last) {
            rest += mass[i];
          } else if (column + i < size) {
            ++equal;
          }
        }
      } else {
        rest += (mass[0] + mass[1]) + (mass[2] + mass[3]);
      }
    }
    const double last_mass = equals > 0 ? mass_of(last, shift) : 0.0;
    Masses masses = row_reduce(Masses{selected, rest},
                               [](Masses a, Masses b) { return Masses{a.selected + b.selected, a.rest + b.rest}; });
    masses.selected += last_mass * wanted;
    masses.rest += last_mass * (equals - wanted);
    const double total = masses.selected + masses.rest;
    if (is_leader()) {
      p.rest[row] = static_cast<float>(masses.rest / total);
      if (p.stats != nullptr) {
        p.stats[3 * row + 1] = shift;
        p.stats[3 * row + 2] = static_cast<float>(total);
      }
    }
    if (p.top > 0) {
      const uint64_t before = row_prefix(static_cast<uint64_t>(equal) << 32 | above);
      uint32_t place = static_cast<uint32_t>(before), equals_before = static_cast<uint32_t>(before >> 32);
      place += equals_before < wanted ? equals_before : wanted;
      const float inverse = static_cast<float>(1.0 / total);
      int32_t* ids = p.ids + row * p.top;
      float* q = p.q + row * p.top;
      for (int column = begin; column < end && above + equal > 0; column += kQuad) {
        float z[kQuad];
        load_quad(kept + column, z);
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          if (!(z[i] >= last) || column + i >= size) continue;
          if (z[i] == last && equals_before++ >= wanted) continue;
          ids[place] = slice.begin + column + i;
          q[place++] = mass_of(z[i], shift) * inverse;
        }
      }
    }
    __syncthreads();  // the next row writes what was read here
  }
}

}  // namespace klflow::cuda
