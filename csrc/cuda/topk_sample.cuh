// Draws a token from the top-k of a row (topk_sample), and re-noises the row towards it (topk_renoise). Every logit has
// a unique 64-bit key, (ordered value, ~column): a larger key is a larger logit or, on ties, a lower column, so the
// result never depends on the order of arrival; the masses are whole numbers for the same reason. k <= 256: one read of
// the row, which stays in shared memory; the k-th largest of the threads' maxima bounds the k-th logit from below, and
// the few logits above it are queued and ranked. Otherwise, or where ties overflow the queue: an 8-bit radix descent
// over the row, by count for k and by mass for top_p. Never materialised: sorted rows, probabilities, x_0. Bytes: one
// read of the logits (topk_renoise: and one write of x).
#pragma once

#include "row.cuh"

namespace klflow::cuda {

constexpr int kMaxQueued = 256;  // the largest k of the queue
constexpr int kQueue = 512;

// Shared memory after the partial results; the kept row follows.
struct TopkShared {
  uint64_t queue[kQueue];       // before, counts of the threads' maxima; where it overflows, weights of a radix digit
  uint64_t sorted[kMaxQueued];  // the k largest keys in order: of the block's slice, in the end of the row
  uint64_t merged[kMaxQueued];  // of the row, in the first block of the cluster
  uint32_t queued;
  uint32_t unused[3];

  __device__ __forceinline__ uint32_t* counts() { return reinterpret_cast<uint32_t*>(queue); }  // 2 kBins
};
constexpr int kTopkRow = kPartialBytes + sizeof(TopkShared);
constexpr int kTopkBytes = kTopkRow + 16;  // the row lies as far past a boundary as in global memory
static_assert(kTopkRow % 16 == 0, "the kept row is read 16 bytes at a time");
__device__ __forceinline__ TopkShared& topk_shared() {
  return *reinterpret_cast<TopkShared*>(shared_memory() + kPartialBytes);
}

__device__ __forceinline__ uint64_t key_of(float logit, int64_t column) {
  return static_cast<uint64_t>(ordered_bits(logit)) << 32 | ~static_cast<uint32_t>(column);
}
__device__ __forceinline__ int64_t column_of(uint64_t key) { return ~static_cast<uint32_t>(key); }

// The largest key such that the keys from it on weigh at least `wanted` >= 1. each(f) calls f(key, weight) for the keys
// of this thread; the weights are whole numbers, so that their order of arrival is of no account.
template <class Each>
__device__ __forceinline__ uint64_t key_reaching(unsigned long long wanted, Each&& each) {
  unsigned long long* weights = reinterpret_cast<unsigned long long*>(topk_shared().queue);
  uint64_t prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int digit = threadIdx.x; digit < 256; digit += kThreads) weights[digit] = 0;
    __syncthreads();
    const uint64_t above = shift == 56 ? 0 : ~0ull << (shift + 8);  // digits already decided
    each([&](uint64_t key, unsigned long long weight) {
      if ((key & above) == prefix) atomicAdd(&weights[key >> shift & 255], weight);
    });
    __syncthreads();
    int digit = 255;
    while (digit > 0 && wanted > weights[digit]) wanted -= weights[digit--];
    prefix |= static_cast<uint64_t>(digit) << shift;
  }
  return prefix;
}

struct Best {
  float score, logit;
  int32_t column;  // -1: none
};
__device__ __forceinline__ Best better(Best a, Best b) {
  if (a.column < 0 || b.column < 0) return a.column < 0 ? b : a;
  return a.score > b.score || (a.score == b.score && a.column < b.column) ? a : b;
}

// The score of a candidate in the Gumbel-max draw.
__device__ __forceinline__ Best candidate(const NoiseKey& key, float logit, int64_t column, float top, float inverse) {
  const Words4 high = noise_words(key, column, kTokenDrawHigh), low = noise_words(key, column, kTokenDrawLow);
  return {(logit - top) * inverse - logf(token_exponential(word_at(high, column), word_at(low, column))), logit,
          static_cast<int32_t>(column)};
}

// The k largest keys of the row in order in `sorted`, in every block of the cluster; false where a queue overflowed.
// A block queues every logit of its slice (columns from `begin` on) that is not below a bound, the k-th largest of the
// threads' maxima (`mine`) to 16 bits, and ranks the queue; then the cluster merges its blocks' sorted keys, each key's
// rank being the sum of its places in all of them. k <= kMaxQueued. The counts have been cleared before a barrier.
template <class T>
__device__ __forceinline__ bool select_queued(const T* slice, int begin, int size, int k, float mine) {
  TopkShared& s = topk_shared();
  const uint32_t falling = ~ordered_bits(mine);
  uint32_t* counts = s.counts();
  atomicAdd(&counts[falling >> 24], 1u);
  __syncthreads();
  const Bin high = find_bin<false>(counts, static_cast<uint32_t>(k));
  if (falling >> 24 == high.index) atomicAdd(&counts[kBins + (falling >> 16 & 255)], 1u);
  __syncthreads();
  const Bin low = find_bin<false>(counts + kBins, high.left);
  const uint32_t least = ~(high.index << 24 | low.index << 16 | 0xffffu);
  const uint32_t lowest = ordered_bits(-infinity());  // whose bin begins among the NaN
  const float bound = value_of_bits(least > lowest ? least : lowest);
  if (threadIdx.x == 0) s.queued = 0;
  if (threadIdx.x < kMaxQueued) s.sorted[threadIdx.x] = 0;  // below every key: a short slice has fewer than k
  __syncthreads();
  if (mine >= bound) {  // another thread's columns hold nothing of interest
    auto queue = [&](float z, int column) {
      if (!(z >= bound)) return;
      const uint32_t place = atomicAdd(&s.queued, 1u);
      if (place < kQueue) s.queue[place] = key_of(z, begin + column);
    };
    read_units(
        slice, size,
        [&](int column, const Words16& unit) {
          if (!(max_of_word<T>(max_words<T>(unit)) >= bound)) return;
#pragma unroll
          for (int i = 0; i < kUnit<T>; ++i) queue(element_of<T>(unit, i), column + i);
        },
        [&](int column) { queue(to_float(slice[column]), column); });
  }
  __syncthreads();
  const uint32_t queued = s.queued;
  for (uint32_t i = threadIdx.x; i < queued && queued <= kQueue; i += kThreads) {
    const uint64_t key = s.queue[i];
    uint32_t rank = 0;
    for (uint32_t j = 0; j < queued; ++j) rank += s.queue[j] > key;
    if (rank < static_cast<uint32_t>(k)) s.sorted[rank] = key;
  }
  __syncthreads();
  if (cluster_size() == 1) return queued <= kQueue;
  const uint32_t most = row_reduce(queued, [](uint32_t a, uint32_t b) { return a > b ? a : b; });  // publishes `sorted`
  if (most > kQueue) return false;
  const uint64_t own = threadIdx.x < kMaxQueued ? s.sorted[threadIdx.x] : 0;
  if (own != 0) {
    int rank = 0;
    for (uint32_t block = 0; block < cluster_size(); ++block) {
      const uint64_t* other =
          reinterpret_cast<const uint64_t*>(map_shared(reinterpret_cast<unsigned char*>(s.sorted), block));
      int place = 0;  // how many of the other's keys are larger
#pragma unroll
      for (int step = kMaxQueued / 2; step > 0; step /= 2)
        if (other[place + step - 1] > own) place += step;
      rank += place + (other[place] > own);
    }
    if (rank < k) reinterpret_cast<uint64_t*>(map_shared(reinterpret_cast<unsigned char*>(s.merged), 0))[rank] = own;
  }
  klflow_cluster_sync();
  if (static_cast<int>(threadIdx.x) < k)
    s.sorted[threadIdx.x] =
        reinterpret_cast<const uint64_t*>(map_shared(reinterpret_cast<unsigned char*>(s.merged), 0))[threadIdx.x];
  return true;  // the next row's reductions lie before s.merged is written again
}

// The first column of the row whose logit is `top`. mine: this thread's maximum.
template <class T>
__device__ __forceinline__ int64_t first_column(const T* held, const Slice& slice, float mine, float top) {
  int first = 0x7fffffff;
  if (mine == top) {
    auto compare = [&](float z, int column) {
      if (z == top && slice.begin + column < first) first = slice.begin + column;
    };
    read_units(
        held, slice.size,
        [&](int column, const Words16& unit) {
#pragma unroll
          for (int i = 0; i < kUnit<T>; ++i) compare(element_of<T>(unit, i), column + i);
        },
        [&](int column) { compare(to_float(held[column]), column); });
  }
  return row_reduce(first, [](int a, int b) { return a < b ? a : b; });
}

// The drawn token, or -1; log_prob likewise, or NaN. The same in every thread.
template <class T>
__device__ __forceinline__ int64_t draw_token(const TopkSampleParams& p, int64_t row, T* room, float& log_prob) {
  log_prob = not_a_number();
  if (p.given.at(row)) {
    log_prob = 0.0f;
    return p.given.known.at(row);
  }
  const Slice slice = slice_of(p.vocab);
  const T* logits = row_of<T>(p.logits, row);
  T* kept = room != nullptr ? room + past_boundary(logits + slice.begin) : nullptr;
  topk_shared().counts()[threadIdx.x] = 0;
  static_assert(kThreads == 2 * kBins);
  // A thread's maximum, and the row's: NaN where there is one.
  const T* own_slice = logits + slice.begin;
  uint32_t word = lowest_word<T>();
  float mine = -infinity();
  read_units(
      own_slice, slice.size,
      [&](int column, const Words16& unit) {
        if (kept != nullptr) store16(kept + column, unit);
        word = max_words<T>(word, max_words<T>(unit));
      },
      [&](int column) {
        if (kept != nullptr) kept[column] = own_slice[column];
        mine = to_float(own_slice[column]);
      });
  mine = max_nan(mine, max_of_word<T>(word));
  const float top = row_reduce(mine, [](float a, float b) { return max_nan(a, b); });
  if (!(top < infinity()) || top == -infinity()) return -1;
  const T* held_slice = kept != nullptr ? kept : own_slice;
  if (p.k == 1) {
    log_prob = 0.0f;
    return first_column(held_slice, slice, mine, top);
  }
  const double inverse = 1.0 / p.temperature.at(row, 1.0f);
  const float top_p = p.top_p.at(row, 1.0f);
  const NoiseKey key = noise_key(p.rng, row);
  double unit = 4611686018427387904.0;  // 2^62, divided until V of the largest masses, 1, do not exceed it
  for (int64_t columns = 1; columns < p.vocab; columns *= 2) unit *= 0.5;
  auto mass = [&](float z) {  // in units
    return static_cast<unsigned long long>(exp(static_cast<double>(z - top) * inverse) * unit + 0.5);
  };
  auto share_of = [&](unsigned long long total) {  // top_p of it
    const double wanted = top_p * static_cast<double>(total) + 0.5;
    return wanted < 1.0 ? 1ull : static_cast<unsigned long long>(wanted);
  };
  auto sum_of = [](unsigned long long mine) {
    return row_reduce<false>(mine, [](unsigned long long a, unsigned long long b) { return a + b; });
  };
  auto score = [&](float z, int64_t j) { return candidate(key, z, j, top, static_cast<float>(inverse)); };
  Best choice{-infinity(), 0.0f, -1};
  unsigned long long total;
  if (p.k <= kMaxQueued && select_queued<T>(held_slice, slice.begin, slice.size, static_cast<int>(p.k), mine)) {
    uint32_t n = static_cast<uint32_t>(p.k);
    const bool have = threadIdx.x < n;
    const uint64_t own = have ? topk_shared().sorted[threadIdx.x] : 0;
    const float z = have ? value_of_bits(static_cast<uint32_t>(own >> 32)) : 0.0f;
    const unsigned long long own_mass = have ? mass(z) : 0;
    total = sum_of(own_mass);
    if (top_p < 1.0f) {  // the shortest prefix, by rank, that holds the mass
      const bool within = row_prefix<false>(own_mass) < share_of(total);
      n = static_cast<uint32_t>(__syncthreads_count(have && within));
      total = sum_of(threadIdx.x < n ? own_mass : 0);
    }
    if (threadIdx.x < n) choice = score(z, column_of(own));
  } else {  // every block of a cluster does the same, over the whole row
    const T* source = kept != nullptr && cluster_size() == 1 ? kept : logits;
    auto each = [&](uint64_t threshold, auto&& f) {
      for (int column = kVector * static_cast<int>(threadIdx.x); column < p.vocab; column += kVector * kThreads) {
        const Vector<T> raw = load_vector<T>(source, column, p.vocab, from_float<T>(0.0f));
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const float z = to_float(raw.element[i]);
          if (column + i < p.vocab && key_of(z, column + i) >= threshold) f(z, column + i);
        }
      }
    };
    auto mass_from = [&](uint64_t threshold) {
      unsigned long long held = 0;
      each(threshold, [&](float z, int64_t) { held += mass(z); });
      return sum_of(held);
    };
    uint64_t threshold = 0;
    if (p.k < p.vocab)
      threshold = key_reaching(p.k, [&](auto&& f) { each(0, [&](float z, int64_t j) { f(key_of(z, j), 1); }); });
    total = mass_from(threshold);
    if (top_p < 1.0f) {
      const uint64_t reached = key_reaching(
          share_of(total), [&](auto&& f) { each(threshold, [&](float z, int64_t j) { f(key_of(z, j), mass(z)); }); });
      threshold = reached > threshold ? reached : threshold;
      total = mass_from(threshold);
    }
    each(threshold, [&](float z, int64_t j) { choice = better(choice, score(z, j)); });
  }
  choice = row_reduce<false>(choice, [](Best a, Best b) { return better(a, b); });
  log_prob =
      static_cast<float>(static_cast<double>(choice.logit - top) * inverse - log(static_cast<double>(total) / unit));
  return choice.column;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) topk_sample_kernel(TopkSampleParams p, bool keep) {
  const Cluster cluster;
  T* room = keep ? reinterpret_cast<T*>(shared_memory() + kTopkRow) : nullptr;
  for (int64_t row = first_row(); row < p.rows; row += row_step()) {
    float log_prob;
    const int64_t token = draw_token<T>(p, row, room, log_prob);
    if (is_leader()) {
      p.token[row] = token;
      if (p.log_prob != nullptr) p.log_prob[row] = log_prob;
    }
    __syncthreads();  // the next row writes what was read here
  }
}

// The kept bytes hold the logits first and the noise afterwards; barriers of the draw and of the noise lie between.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 2) topk_renoise_kernel(TopkRenoiseParams p, bool keep) {
  const Cluster cluster;
  T* room = keep ? reinterpret_cast<T*>(shared_memory() + kTopkRow) : nullptr;
  const TopkSampleParams& s = p.sample;
  for (int64_t row = first_row(); row < s.rows; row += row_step()) {
    float log_prob;
    const int64_t token = draw_token<T>(s, row, room, log_prob);
    if (is_leader()) {
      s.token[row] = token;
      if (s.log_prob != nullptr) s.log_prob[row] = log_prob;
    }
    if (s.given.at(row))
      store_onehot(p.out, row, s.vocab, token, false);
    else  // token -1 gives a row of NaN
      noise_interpolate_row<false, kTopkRow>(row_of<Out>(p.out, row), s.vocab, noise_key(s.rng, row), token,
                                             p.t_next.at(row), p.c, keep);
  }
}

}  // namespace klflow::cuda
