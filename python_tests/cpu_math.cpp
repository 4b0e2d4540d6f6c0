// Prints the largest errors of csrc/cpu/exp2.h and noise.h's exp2 and log2 over a dense sweep of their arguments: "name
// error" lines, exp2v in units in the last place, the others as test_cpu_math.py says. Built once for each instruction
// set.
#include <cmath>
#include <cstdio>

#include "cpu/noise.h"

using namespace klflow;
using namespace klflow::KLFLOW_ISA;

namespace {

constexpr int kWidth = kLanes * kChains;

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Calls measure(arguments, n) on blocks of kWidth floats: bit patterns from low to high, `stride` apart.
template <class F>
void sweep(float low, float high, uint32_t stride, float sign, F&& measure) {
  uint32_t bits, end;
  std::memcpy(&bits, &low, 4);
  std::memcpy(&end, &high, 4);
  while (bits <= end) {
    float x[kWidth];
    for (int i = 0; i < kWidth; ++i, bits += stride) x[i] = sign * from_bits(bits <= end ? bits : end);
    measure(x);
  }
}

double ulps(double got, double want) {
  const int exponent = std::ilogb(want);
  return std::fabs(got - want) / std::ldexp(1.0, exponent - 23);
}

template <class F>
void in_vectors(float* x, F&& f) {
  vf v[kChains];
  for (int i = 0; i < kChains; ++i) v[i] = load(x + i * kLanes);
  f(v);
  for (int i = 0; i < kChains; ++i) store(x + i * kLanes, v[i]);
}

}  // namespace

int main() {
  double worst = 0.0;
  auto exp2 = [&](float* x) {
    float y[kWidth];
    std::memcpy(y, x, sizeof(y));
    in_vectors(y, [](vf* v) { each_chain([&](int i) { v[i] = exp2v(v[i]); }); });
    for (int i = 0; i < kWidth; ++i) worst = std::fmax(worst, ulps(y[i], std::exp2(static_cast<double>(x[i]))));
  };
  sweep(1e-9f, 126.0f, 37, 1.0f, exp2);
  sweep(1e-9f, 123.9f, 37, -1.0f, exp2);
  std::printf("exp2v %.3f\n", worst);

  worst = 0.0;
  auto power = [&](float* x) {
    float y[kWidth];
    std::memcpy(y, x, sizeof(y));
    in_vectors(y, [](vf* v) { exp2_chains(v); });
    for (int i = 0; i < kWidth; ++i)
      worst = std::fmax(worst, std::fabs(y[i] / std::exp2(static_cast<double>(x[i])) - 1));
  };
  sweep(1e-9f, 120.0f, 37, 1.0f, power);
  sweep(1e-9f, 120.0f, 37, -1.0f, power);
  std::printf("exp2_chains %.3g\n", worst);

  double relative = 0.0, absolute = 0.0;
  auto log2 = [&](float* x) {
    float y[kWidth], z[kWidth];
    std::memcpy(y, x, sizeof(y));
    std::memcpy(z, x, sizeof(z));
    in_vectors(y, [](vf* v) { log2_chains(v); });
    in_vectors(z, [](vf* v) { log2_absolute_chains(v); });
    for (int i = 0; i < kWidth; ++i) {
      const double want = std::log2(static_cast<double>(x[i]));
      relative = std::fmax(relative, want == 0.0 ? std::fabs(y[i]) : std::fabs(y[i] / want - 1));
      absolute = std::fmax(absolute, std::fabs(z[i] - want) / std::fmax(1.0, std::fabs(want)));
    }
  };
  sweep(1e-10f, 40.0f, 61, 1.0f, log2);
  sweep(0.45f, 2.1f, 1, 1.0f, log2);  // every float where the cells of the tables meet 1
  std::printf("log2_chains %.3g\nlog2_absolute_chains %.3g\n", relative, absolute);

  // Edges: exact one, zero below 2^-124, NaN stays.
  float edges[kWidth] = {0.0f, -200.0f, -kInf, kNaN};
  in_vectors(edges, [](vf* v) { v[0] = exp2v(v[0]); });
  std::printf("edges %d\n", edges[0] == 1.0f && edges[1] == 0.0f && edges[2] == 0.0f && edges[3] != edges[3]);
}
