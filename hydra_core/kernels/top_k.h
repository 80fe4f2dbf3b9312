// The largest scores of a line, in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

// Indices of the `count` largest of `size` scores in order, the first among equals, and their softmax probabilities.
inline void top_k(const Value* scores, int64_t size, int64_t count, int64_t* index, float* chance) {
  std::fill_n(chance, count, -INFINITY);
  std::fill_n(index, count, 0);
  for (int64_t at = 0; at < size; at += 16) {
    const Floats values = first_of(load_first(scores + at, size - at), size - at, all(-INFINITY));
    uint32_t candidates = greater(values, all(chance[count - 1]));
    for (; candidates; candidates &= candidates - 1) {
      const int64_t i = at + __builtin_ctz(candidates);
      const float value = static_cast<float>(scores[i]);
      if (!(value > chance[count - 1])) continue;  // an earlier value of these sixteen took its place
      int64_t place = count - 1;
      for (; place > 0 && value > chance[place - 1]; --place) {
        chance[place] = chance[place - 1];
        index[place] = index[place - 1];
      }
      chance[place] = value;
      index[place] = i;
    }
  }
  Floats total = zeros();
  const float top = chance[0];
  for (int64_t at = 0; at < size; at += 16)
    total = total + exponential(first_of(load_first(scores + at, size - at), size - at, all(-INFINITY)) - all(top));
  const float mass = sum(total);
  for (int64_t i = 0; i < count; ++i) chance[i] = std::exp(chance[i] - top) / mass;
}

}  // namespace simd
#endif

namespace native {

// Indices and values of the `count` largest of `size` scores in order, the first among equals. They are inserted as they are
// found: after the first few, hardly any score is large enough.
inline void top_k(const float* from, int64_t size, int64_t count, int64_t* index, float* value) {
  std::fill_n(value, count, -std::numeric_limits<float>::infinity());
  std::fill_n(index, count, 0);
  for (int64_t i = 0; i < size; ++i) {
    if (!(from[i] > value[count - 1])) continue;
    int64_t place = count - 1;
    for (; place > 0 && from[i] > value[place - 1]; --place) {
      value[place] = value[place - 1];
      index[place] = index[place - 1];
    }
    value[place] = from[i];
    index[place] = i;
  }
}

}  // namespace native
