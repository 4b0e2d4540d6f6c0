// Kernels with one planted bug each, and their right forms: what the SIMT machine must catch, and must not.
#include "cuda/device.cuh"

using klflow::cuda::shared_memory;

namespace {

constexpr unsigned kThreads = 64;

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

// out[i] = in[n - 1 - i] through shared memory.
void reverse(const float* in, float* out, bool barrier, unsigned past) {
  float* s = shared_floats();
  const unsigned i = threadIdx.x;
  s[i + past] = in[i];
  if (barrier) __syncthreads();
  out[i] = s[kThreads - 1 - i + past];
}

void uninitialised(const float* in, float* out) {
  float* s = shared_floats();
  const unsigned i = threadIdx.x;
  if (i != 5) s[i] = in[i];
  __syncthreads();
  out[i] = s[i];
}

void sum_warp(const float* in, float* out, unsigned mask, bool all_lanes) {
  float x = in[threadIdx.x];
  if (all_lanes || threadIdx.x % 32 < 16)
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  out[threadIdx.x] = x;
}

void early_exit(const float* in, float* out, unsigned live) {
  if (threadIdx.x >= live) return;
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

void two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

// Every block of a cluster reads its neighbour's value.
void neighbour(const float* in, float* out, bool first_barrier, bool last_barrier) {
  float* s = shared_floats();
  const unsigned rank = simt::cluster_rank(), i = blockIdx.x * kThreads + threadIdx.x;
  s[threadIdx.x] = in[i];
  if (first_barrier) simt::cluster_barrier(KLFLOW_SITE);
  const unsigned other = (rank + 1) % simt::cluster_size();
  out[i] = reinterpret_cast<float*>(simt::map_shared(shared_memory(), other))[threadIdx.x];
  if (last_barrier) simt::cluster_barrier(KLFLOW_SITE);
}

// Twice the neighbour's value by way of two rounds; with one slot, the second round's value may come before the first
// one's is read.
void neighbour_twice(const float* in, float* out, unsigned slots) {
  float* s = shared_floats();
  const unsigned other = (simt::cluster_rank() + 1) % simt::cluster_size();
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  out[i] = 0.0f;
  for (unsigned round = 0; round < 2; ++round) {
    float* slot = s + round % slots;
    for (int barriers = 0; barriers < 8; ++barriers) __syncthreads();  // work that takes a while
    if (threadIdx.x == 0) *slot = in[blockIdx.x * kThreads] + static_cast<float>(1000 * round);
    simt::cluster_barrier(KLFLOW_SITE);
    out[i] += *reinterpret_cast<float*>(simt::map_shared(reinterpret_cast<unsigned char*>(slot), other));
  }
  simt::cluster_barrier(KLFLOW_SITE);
}

void count(float* out) {
  unsigned* counter = reinterpret_cast<unsigned*>(shared_memory());
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  const unsigned place = atomicAdd(counter, 1u);
  out[place] = static_cast<float>(place);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* planted(const char* what, const float* in, float* out,
                                                                      unsigned blocks, unsigned cluster) {
  const std::string name = what;
  const auto kernel = [&] {
    if (name == "reverse") return reverse(in, out, true, 0);
    if (name == "reverse_no_barrier") return reverse(in, out, false, 0);
    if (name == "reverse_off_by_one") return reverse(in, out, true, 1);
    if (name == "uninitialised") return uninitialised(in, out);
    if (name == "sum_warp") return sum_warp(in, out, ~0u, true);
    if (name == "sum_warp_mask_without_self") return sum_warp(in, out, 0xffffu, true);
    if (name == "sum_warp_missing_lanes") return sum_warp(in, out, ~0u, false);
    if (name == "sum_warp_outside_mask") return sum_warp(in, out, 0xffffu, false);
    if (name == "early_exit") return early_exit(in, out, 40);
    if (name == "two_barriers") return two_barriers(in, out);
    if (name == "neighbour") return neighbour(in, out, true, true);
    if (name == "neighbour_no_barrier") return neighbour(in, out, false, true);
    if (name == "neighbour_exits_early") return neighbour(in, out, true, false);
    if (name == "neighbour_twice") return neighbour_twice(in, out, 2);
    if (name == "neighbour_twice_one_slot") return neighbour_twice(in, out, 1);
    if (name == "count") return count(out);
  };
  return simt::launch(what, kernel, blocks, kThreads, kThreads * sizeof(float), cluster);
}
extern "C" __attribute__((visibility("default"))) void planted_seed(uint64_t seed) { simt::seed(seed); }
extern "C" __attribute__((visibility("default"))) void planted_kind(int clusters, int64_t block_bytes) {
  simt::set_device_kind({clusters != 0, block_bytes, block_bytes});
}
