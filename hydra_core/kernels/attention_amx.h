// Attention of up to sixteen queries of one head, by AMX: slots are a tile's lines and queries its columns, so keys are read
// as they are stored and the softmax needs no sums across a register; only values are interleaved.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "amx.h"
#include "attention_simd.h"
#include "simd.h"

#if defined(HYDRA_AVX512) && defined(HYDRA_AMX)
namespace simd {

constexpr int64_t TILE = 16;  // lines of a tile, and 32-bit values in one

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

// A thread's buffers for sixteen queries of one head: scores [slots, 16] and weights [16, slots], with the number of slots
// rounded up to a multiple of 32.
struct Workspace {
  std::vector<float> scores;
  std::vector<Value> weights;
  alignas(64) int32_t queries[256 / 2][TILE];
  alignas(64) Value pairs[TILE][2 * 64];
  alignas(64) Value last[2 * TILE][256];
  alignas(64) float sums[TILE][64];

  void fit(int64_t slots) {
    scores.resize(slots * TILE);
    weights.resize(slots * TILE);
  }
};

// Transpose `count` queries [count, width] into columns of tiles: [width / 2, 16] pairs of values, zero past `count`.
inline void transpose_queries(const Value* queries, int64_t count, int64_t width, Workspace& work) {
  alignas(64) static const int32_t none[128] = {};
  const int32_t* lines[TILE];
  for (int64_t i = 0; i < TILE; ++i) lines[i] = i < count ? reinterpret_cast<const int32_t*>(queries + i * width) : none;
  __m512i transposed[TILE];
  for (int64_t at = 0; at < width / 2; at += TILE) {
    load_transposed_16x16(lines, at, transposed);
    for (int64_t i = 0; i < TILE; ++i) _mm512_store_si512(work.queries[at + i], transposed[i]);
  }
}

// Products of 32 slots' keys with the queries: `scores` [32, 16].
inline void key_query_products(const Value* keys, int64_t stride, int64_t width, const Workspace& work, float* scores) {
  compiler_barrier();
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t at = 0; at < width; at += TILE_INPUTS) {
    _tile_loadd(6, work.queries[at / 2], 4 * TILE);
    _tile_loadd(4, keys + at, stride * sizeof(Value));
    _tile_loadd(5, keys + TILE * stride + at, stride * sizeof(Value));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, scores, 4 * TILE);
  _tile_stored(1, scores + TILE * TILE, 4 * TILE);
}

// Scaled and masked products [slots, 16] of all keys with the queries; past `kv_len` they are -inf. Returns each query's
// largest. `open`: slots from the first on that no query masks.
inline __m512 attention_scores_amx(const KeyValues& head, int64_t slots, const Value* mask, int64_t open, int64_t first,
                                   int64_t count, int64_t nodes, int64_t line, float scale, Workspace& work) {
  float* scores = work.scores.data();
  for (int64_t slot = 0; slot < slots; slot += 2 * TILE) {
    const int64_t there = std::min(head.kv_len - slot, 2 * TILE);
    if (there == 2 * TILE) {
      key_query_products(head.keys + slot * head.stride, head.stride, head.width, work, scores + slot * TILE);
      continue;
    }
    for (int64_t i = 0; i < 2 * TILE; ++i)  // memory past `kv_len` may not exist
      if (i < there) std::copy_n(head.keys + (slot + i) * head.stride, head.width, work.last[i]);
      else std::fill_n(work.last[i], head.width, Value(0));
    key_query_products(work.last[0], 256, head.width, work, scores + slot * TILE);
  }
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 most = _mm512_set1_ps(-INFINITY);
  const int64_t free = std::min(open / TILE * TILE, head.kv_len / TILE * TILE);
  for (int64_t slot = 0; slot < free; ++slot) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(scores + slot * TILE), factor);
    _mm512_storeu_ps(scores + slot * TILE, value);
    most = _mm512_max_ps(most, value);
  }
  for (int64_t slot = free; slot < slots; slot += TILE) {
    __m512i masks[TILE];
    alignas(64) int32_t lines[TILE][TILE];
    const int32_t* each[TILE];
    const int64_t there = std::max<int64_t>(0, std::min(head.kv_len - slot, TILE));
    const __mmask16 inside = (1u << there) - 1;
    for (int64_t query = 0; query < TILE; ++query) {
      const Value* from = mask && query < count ? mask + (first + query) % nodes * line + slot : nullptr;
      const __m512 values = from ? widen(_mm256_maskz_loadu_epi16(inside, from)) : _mm512_setzero_ps();
      _mm512_store_ps(reinterpret_cast<float*>(lines[query]), _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), values));
      each[query] = lines[query];
    }
    load_transposed_16x16(each, 0, masks);
    for (int64_t i = 0; i < TILE; ++i) {
      float* at = scores + (slot + i) * TILE;
      const __m512 value = _mm512_fmadd_ps(_mm512_loadu_ps(at), factor, _mm512_castsi512_ps(masks[i]));
      _mm512_storeu_ps(at, value);
      most = _mm512_max_ps(most, value);
    }
  }
  return most;
}

// Turn scores [slots, 16] into weights [16, slots] before their division by the sums, which are returned.
inline __m512 softmax_amx(int64_t slots, __m512 most, Workspace& work) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t slot = 0; slot < slots; slot += TILE) {
    __m512i weights[TILE], transposed[TILE];
    for (int64_t i = 0; i < TILE; ++i) {
      const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(work.scores.data() + (slot + i) * TILE), most));
      sum = _mm512_add_ps(sum, weight);
      weights[i] = _mm512_castps_si512(weight);
    }
    transpose_16x16(weights, transposed);
    for (int64_t query = 0; query < TILE; ++query)
      store(work.weights.data() + query * slots + slot, _mm512_castsi512_ps(transposed[query]));
  }
  return sum;
}

// Interleave 32 slots' values by pairs of slots, for `wide` (64, or the last 32) of the head's width from `at` on:
// [16, wide, 2].
inline void interleave_values(const KeyValues& head, int64_t slot, int64_t at, int64_t wide, Workspace& work) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i)
    for (int half = 0; half < 2; ++half) order[half][i] = i / 2 + 16 * half + 32 * (i % 2);
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t pair = 0; pair < TILE; ++pair) {
    const int64_t first = slot + 2 * pair;
    for (int64_t i = 0; i < wide; i += 32) {
      const Value* from = head.values + first * head.stride + at + i;
      const __m512i a = first < head.kv_len ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
      const __m512i b = first + 1 < head.kv_len ? _mm512_loadu_si512(from + head.stride) : _mm512_setzero_si512();
      _mm512_store_si512(work.pairs[pair] + 2 * i, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(work.pairs[pair] + 2 * i + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Values summed by the queries' weights, for 64 (WIDE, or the last 32) of the head's width from `at` on: `sums` [16, 64].
template <bool WIDE>
void weighted_values_amx(const KeyValues& head, int64_t at, int64_t slots, Workspace& work) {
  constexpr int64_t BYTES = sizeof(work.pairs[0]);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (WIDE) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t slot = 0; slot < slots; slot += 2 * TILE) {
    interleave_values(head, slot, at, WIDE ? 64 : 32, work);
    compiler_barrier();
    _tile_loadd(4, work.weights.data() + slot, slots * sizeof(Value));
    _tile_loadd(6, work.pairs[0], BYTES);
    _tile_loadd(7, work.pairs[0] + 32, BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (WIDE) {
      _tile_loadd(6, work.pairs[0] + 64, BYTES);
      _tile_loadd(7, work.pairs[0] + 96, BYTES);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, work.sums[0], 4 * 64);
  _tile_stored(1, work.sums[0] + 16, 4 * 64);
  if constexpr (WIDE) {
    _tile_stored(2, work.sums[0] + 32, 4 * 64);
    _tile_stored(3, work.sums[0] + 48, 4 * 64);
  }
}

// Attention of up to sixteen queries [count, width] of one head; `targets`: where each query's result goes.
inline void attention_amx(const KeyValues& head, const Value* queries, int64_t first, int64_t count, const Value* mask,
                          int64_t open, int64_t nodes, int64_t line, float scale, Value* const* targets, Workspace& work) {
  const int64_t slots = (head.kv_len + 2 * TILE - 1) / (2 * TILE) * (2 * TILE);
  work.fit(slots);
  transpose_queries(queries, count, head.width, work);
  const __m512 most = attention_scores_amx(head, slots, mask, open, first, count, nodes, line, scale, work);
  alignas(64) float inverse_sums[TILE];
  _mm512_store_ps(inverse_sums, _mm512_div_ps(_mm512_set1_ps(1.0f), softmax_amx(slots, most, work)));
  for (int64_t at = 0; at < head.width; at += 64) {
    const int64_t wide = std::min<int64_t>(head.width - at, 64);
    wide == 64 ? weighted_values_amx<true>(head, at, slots, work) : weighted_values_amx<false>(head, at, slots, work);
    for (int64_t query = 0; query < count; ++query)
      for (int64_t i = 0; i < wide; i += 16)
        store(targets[query] + at + i, load(work.sums[query] + i) * all(inverse_sums[query]));
  }
}

}  // namespace simd
#endif
