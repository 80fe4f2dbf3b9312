// Sixteen float32 values in one register of AVX-512, pairs of bfloat16 values for its dot product, and a 16 x 16 transpose.
#pragma once

#include <ATen/ATen.h>

#include <immintrin.h>

namespace simd {

using Value = at::BFloat16;
using Floats = __m512;
using Pairs = __m512bh;  // two bfloat16 values in each of sixteen lanes

HYDRA_INLINE Floats zeros() { return _mm512_setzero_ps(); }
HYDRA_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
HYDRA_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
HYDRA_INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
HYDRA_INLINE Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
HYDRA_INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }
HYDRA_INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }
// One bit for each lane, the first the lowest.
HYDRA_INLINE uint32_t greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
HYDRA_INLINE uint32_t equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// x * 2^whole where `given` is greater than `least`, else 0.
HYDRA_INLINE Floats times_power_where(Floats x, Floats whole, Floats given, float least) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(given, all(least), _CMP_GT_OQ), x, whole);
}

// The first `count` lanes, all where there are more.
HYDRA_INLINE __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }
// `x` in the first `count` lanes, `rest` in the others.
HYDRA_INLINE Floats first_of(Floats x, int64_t count, Floats rest) { return _mm512_mask_blend_ps(first_lanes(count), rest, x); }

// Sixteen bfloat16 values as float32, and back with rounding to nearest.
HYDRA_INLINE Floats widen(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }
HYDRA_INLINE __m256i narrow(Floats values) { return (__m256i)_mm512_cvtneps_pbh(values); }
HYDRA_INLINE Floats load(const float* at) { return _mm512_loadu_ps(at); }
HYDRA_INLINE Floats load(const Value* at) { return widen(_mm256_loadu_si256((const __m256i*)at)); }
HYDRA_INLINE Floats load(const at::Half* at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at)); }
HYDRA_INLINE void store(float* at, Floats values) { _mm512_storeu_ps(at, values); }
HYDRA_INLINE void store(Value* at, Floats values) { _mm256_storeu_si256((__m256i*)at, narrow(values)); }
// Only the first `count` values are in memory; the others are read as 0.
HYDRA_INLINE Floats load_first(const float* at, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), at); }
HYDRA_INLINE Floats load_first(const Value* at, int64_t count) { return widen(_mm256_maskz_loadu_epi16(first_lanes(count), at)); }
HYDRA_INLINE void store_first(float* at, Floats values, int64_t count) { _mm512_mask_storeu_ps(at, first_lanes(count), values); }
HYDRA_INLINE void store_first(Value* at, Floats values, int64_t count) {
  _mm256_mask_storeu_epi16(at, first_lanes(count), narrow(values));
}

// Operands of the bf16 dot product: 32 values, or the two at `at` in every lane.
HYDRA_INLINE Pairs as_pairs(__m512i values) { return (Pairs)values; }
HYDRA_INLINE Pairs load_pairs(const Value* at) { return as_pairs(_mm512_loadu_si512(at)); }
HYDRA_INLINE Pairs broadcast_pair(const Value* at) { return as_pairs(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(at))); }
HYDRA_INLINE Floats dot(Floats sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

// Transpose sixteen lines of sixteen 32-bit values; overwrites `a`.
HYDRA_INLINE void transpose_16x16(__m512i* a, __m512i* transposed) {
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // column i of each 128-bit lane, of lines 0-3, 4-7, 8-11, 12-15
    const __m512i low = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), high = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12],
                                                                                                       0xdd);
    transposed[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    transposed[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    transposed[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    transposed[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

// The transpose of sixteen lines' 32-bit values `offset` to `offset` + 15.
HYDRA_INLINE void load_transposed_16x16(const int32_t* const* lines, int64_t offset, __m512i* transposed) {
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(lines[i] + offset);
  transpose_16x16(a, transposed);
}

// The same as operands of the dot product: lane i of each holds a pair of line i.
HYDRA_INLINE void load_transposed_pairs(const int32_t* const* lines, int64_t offset, Pairs* transposed) {
  __m512i columns[16];
  load_transposed_16x16(lines, offset, columns);
  for (int i = 0; i < 16; ++i) transposed[i] = as_pairs(columns[i]);
}

}  // namespace simd
