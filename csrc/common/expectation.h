// How softmax_expectation finds f(log p) on every backend. Places are counted in knots from the top: 0 is log p = 0,
// where the places of large p, and their roundings, are small.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace klflow {

// f between one knot and the next lower one: value + difference r, r in [0, 1] the way between them. The last cell is
// all that lies below the lowest knot.
struct alignas(8) Cell {
  float value, difference;
};
KLFLOW_HD Cell cell_of(const float* table, int64_t knots, int64_t cell) {
  const float value = table[knots - 1 - cell];
  return {value, cell + 1 < knots ? table[knots - 2 - cell] - value : 0.0f};
}

// Of a row whose lse is shift + log_total: the place of log p is offset - scale (z - lse), and lse a float32 number, of
// which p is exp(z - lse) but for a common factor. In double once for each row: logits of any size leave no error.
// Where a row has no mean, both are NaN, or (only -infinity) lse is -infinity.
struct RowPlaces {
  float lse, offset;
};
KLFLOW_HD RowPlaces places_of(float shift, double log_total, float scale) {
  const float lse = static_cast<float>(shift + log_total);
  const double rounded = log_total - (static_cast<double>(lse) - shift);
  return {lse, static_cast<float>(rounded * scale)};
}

}  // namespace klflow
