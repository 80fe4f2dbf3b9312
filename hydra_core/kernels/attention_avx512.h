// Attention of up to twelve queries of one head, by AVX-512: sixteen keys at a time are transposed in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

#ifdef HYDRA_AVX512
namespace avx512 {

constexpr int64_t MAX_QUERIES = 12;  // queries of a head that share its transposed keys

// One head's keys and values of one sequence: `stride` from a slot to the next, `kv_len` slots that the sequence has filled,
// `width` a multiple of 32.
struct KeyValues {
  const Value *keys, *values;
  int64_t stride, kv_len, width;
};

// Scaled and masked products [count, padded] of queries [count, width] with all keys; past `kv_len` they are -inf. `mask`:
// [nodes, `line`] additive, or null. `first`: index of the first query among the head's, for its line of the mask.
inline void attention_scores(const KeyValues& head, const Value* queries, int64_t first, int64_t count, const Value* mask,
                             int64_t nodes, int64_t line, float scale, float* scores, int64_t padded) {
  const int64_t pairs = head.width / 2;
  std::vector<__m512i> transposed(pairs);
  for (int64_t slot = 0; slot < head.kv_len; slot += 16) {
    const int32_t* lines[16];
    for (int64_t i = 0; i < 16; ++i)
      lines[i] = reinterpret_cast<const int32_t*>(head.keys + std::min(slot + i, head.kv_len - 1) * head.stride);
    for (int64_t at = 0; at < pairs; at += 16) load_transposed_16x16(lines, at, transposed.data() + at);
    const __mmask16 inside = head.kv_len - slot >= 16 ? 0xffff : (1 << (head.kv_len - slot)) - 1;
    for (int64_t query = 0; query < count; ++query) {
      const Value* values = queries + query * head.width;
      __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
      for (int64_t at = 0; at < pairs; at += 2) {
        sum = _mm512_dpbf16_ps(sum, as_bf16(transposed[at]), broadcast_pair(values + 2 * at));
        other = _mm512_dpbf16_ps(other, as_bf16(transposed[at + 1]), broadcast_pair(values + 2 * at + 2));
      }
      sum = _mm512_mul_ps(_mm512_add_ps(sum, other), _mm512_set1_ps(scale));
      if (mask) sum = _mm512_add_ps(sum, widen(_mm256_maskz_loadu_epi16(inside, mask + (first + query) % nodes * line + slot)));
      _mm512_storeu_ps(scores + query * padded + slot, _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), sum));
    }
  }
}

// Replace scores by weights that sum to one.
inline void softmax(float* scores, int64_t padded) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top));
    sum = _mm512_add_ps(sum, weight);
    _mm512_storeu_ps(scores + i, weight);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
  for (int64_t i = 0; i < padded; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), scale));
}

// Values summed by the weights of COUNT queries, 32 of the head's width at a time; `targets`: where each query's go.
template <int COUNT>
void weighted_values(const KeyValues& head, const float* weights, int64_t padded, Value* const* targets) {
  for (int64_t at = 0; at < head.width; at += 32) {
    __m512 sums[COUNT][2];
    for (int query = 0; query < COUNT; ++query) sums[query][0] = sums[query][1] = _mm512_setzero_ps();
    for (int64_t slot = 0; slot < head.kv_len; ++slot) {
      const Value* from = head.values + slot * head.stride + at;
      const __m512 low = load16(from), high = load16(from + 16);
      for (int query = 0; query < COUNT; ++query) {
        const __m512 weight = _mm512_set1_ps(weights[query * padded + slot]);
        sums[query][0] = _mm512_fmadd_ps(weight, low, sums[query][0]);
        sums[query][1] = _mm512_fmadd_ps(weight, high, sums[query][1]);
      }
    }
    for (int query = 0; query < COUNT; ++query)
      for (int half = 0; half < 2; ++half)
        store16(targets[query] + at + 16 * half, sums[query][half]);
  }
}

// Index of the first of `count` mask values that is not 0, or `count`.
inline int64_t first_masked(const Value* mask, int64_t count) {
  int64_t slot = 0;
  for (; slot + 32 <= count; slot += 32) {
    const __mmask32 masked = _mm512_test_epi16_mask(_mm512_loadu_si512(mask + slot), _mm512_set1_epi16(-1));
    if (masked) return slot + __builtin_ctz(masked);
  }
  while (slot < count && mask[slot].x == 0) ++slot;
  return slot;
}

}  // namespace avx512
#endif
