// Attention of up to twelve queries of one head, by AVX-512 or AVX2: sixteen keys at a time are transposed in registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

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
  std::vector<Pairs> transposed(pairs);
  for (int64_t slot = 0; slot < head.kv_len; slot += 16) {
    const int32_t* lines[16];
    for (int64_t i = 0; i < 16; ++i)
      lines[i] = reinterpret_cast<const int32_t*>(head.keys + std::min(slot + i, head.kv_len - 1) * head.stride);
    for (int64_t at = 0; at < pairs; at += 16) load_transposed_pairs(lines, at, transposed.data() + at);
    const int64_t inside = head.kv_len - slot;
    for (int64_t query = 0; query < count; ++query) {
      const Value* values = queries + query * head.width;
      Floats sum = zeros(), other = zeros();
      for (int64_t at = 0; at < pairs; at += 2) {
        sum = dot(sum, transposed[at], broadcast_pair(values + 2 * at));
        other = dot(other, transposed[at + 1], broadcast_pair(values + 2 * at + 2));
      }
      sum = (sum + other) * all(scale);
      if (mask) sum = sum + load_first(mask + (first + query) % nodes * line + slot, inside);
      store(scores + query * padded + slot, first_of(sum, inside, all(-INFINITY)));
    }
  }
}

// Replace scores by weights that sum to one.
inline void softmax(float* scores, int64_t padded) {
  Floats most = all(-INFINITY), total = zeros();
  for (int64_t i = 0; i < padded; i += 16) most = max(most, load(scores + i));
  const Floats top = all(largest(most));
  for (int64_t i = 0; i < padded; i += 16) {
    const Floats weight = exponential(load(scores + i) - top);
    total = total + weight;
    store(scores + i, weight);
  }
  const Floats scale = all(1.0f / sum(total));
  for (int64_t i = 0; i < padded; i += 16) store(scores + i, load(scores + i) * scale);
}

// Values summed by the weights of COUNT queries, 32 of the head's width at a time; `targets`: where each query's go.
template <int COUNT>
void weighted_values(const KeyValues& head, const float* weights, int64_t padded, Value* const* targets) {
  for (int64_t at = 0; at < head.width; at += 32) {
    Floats sums[COUNT][2];
    for (int query = 0; query < COUNT; ++query) sums[query][0] = sums[query][1] = zeros();
    for (int64_t slot = 0; slot < head.kv_len; ++slot) {
      const Value* from = head.values + slot * head.stride + at;
      const Floats low = load(from), high = load(from + 16);
      for (int query = 0; query < COUNT; ++query) {
        const Floats weight = all(weights[query * padded + slot]);
        sums[query][0] = fma(weight, low, sums[query][0]);
        sums[query][1] = fma(weight, high, sums[query][1]);
      }
    }
    for (int query = 0; query < COUNT; ++query)
      for (int half = 0; half < 2; ++half)
        store(targets[query] + at + 16 * half, sums[query][half]);
  }
}

}  // namespace simd
#endif
