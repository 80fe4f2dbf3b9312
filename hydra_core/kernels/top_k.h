// The largest scores of a line, in order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

#ifdef HYDRA_AVX512
namespace avx512 {

// Indices of the `count` largest of `size` scores in order, the first among equals, and their softmax probabilities.
inline void top_k(const Value* scores, int64_t size, int64_t count, int64_t* index, float* chance) {
  std::fill_n(chance, count, -INFINITY);
  std::fill_n(index, count, 0);
  for (int64_t at = 0; at < size; at += 16) {
    const __mmask16 inside = size - at >= 16 ? 0xffff : (1 << (size - at)) - 1;
    const __m512 values = widen(_mm256_maskz_loadu_epi16(inside, scores + at));
    uint32_t candidates = _mm512_mask_cmp_ps_mask(inside, values, _mm512_set1_ps(chance[count - 1]), _CMP_GT_OQ);
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
  __m512 sum = _mm512_setzero_ps();
  const __m512 most = _mm512_set1_ps(chance[0]);
  for (int64_t at = 0; at < size; at += 16) {
    const __mmask16 inside = size - at >= 16 ? 0xffff : (1 << (size - at)) - 1;
    const __m512 values = _mm512_sub_ps(widen(_mm256_maskz_loadu_epi16(inside, scores + at)), most);
    sum = _mm512_mask_add_ps(sum, inside, sum, exponential(values));
  }
  const float all = _mm512_reduce_add_ps(sum), top = chance[0];
  for (int64_t i = 0; i < count; ++i) chance[i] = std::exp(chance[i] - top) / all;
}

}  // namespace avx512
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
