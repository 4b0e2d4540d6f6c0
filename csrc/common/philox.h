// The noise contract: Philox4x32-10 (Salmon et al., SC'11), one stream of words for every backend.
// key = (seed low, seed high), counter = (column / 4, row, step, stream), word = lane column % 4; see key_of_row.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace klflow {

// Purposes of the streams.
enum Stream : uint32_t { kSimplexNoise = 0, kTokenDrawHigh = 1, kTokenDrawLow = 2 };

// The counter has 32 bits for the row. Those above them, of batches that go on past 2^32 rows, enter the key's high
// word.
KLFLOW_HD uint32_t key_of_row(uint64_t seed, int64_t row) {
  return static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(row >> 32) * 0x9E3779B9u;
}

struct Words4 {
  uint32_t w[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

KLFLOW_HD Words4 philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// U in (0, 1 - 2^-24]: the argument of E = -log U of the simplex noise. Its large-E tail (to 22.9) is fine.
KLFLOW_HD float unclamped_uniform(uint32_t word) {
  return static_cast<float>(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;  // 2^-32, 2^-33
}
KLFLOW_HD float simplex_uniform(uint32_t word) {
  const float u = unclamped_uniform(word);
  return u < 0.99999994f ? u : 0.99999994f;  // 1 - 2^-24
}

// E ~ Exp(1) of a token draw from two words: the small-E tail, which decides the draws, reaches 2^-65.
KLFLOW_HD float token_exponential(uint32_t high, uint32_t low) {
  const float v = static_cast<float>(high) * 2.3283064365386963e-10f +
                  (static_cast<float>(low) + 0.5f) * 5.421010862427522e-20f;  // 2^-32, 2^-64
  return -log1pf(-(v < 0.99999994f ? v : 0.99999994f));
}

}  // namespace klflow
