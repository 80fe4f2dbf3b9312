// Sixteen float32 values in two registers of AVX2, with the functions of `simd_avx512.h`. A pair of bfloat16 values is kept as two
// float32 values, since there is no dot product of bfloat16.
#pragma once

#include <ATen/ATen.h>

#include <immintrin.h>

#include <algorithm>

namespace simd {

using Value = at::BFloat16;

struct Floats {
  __m256 low, high;
};

// Two bfloat16 values in each of sixteen lanes: the first of each pair, and the second.
struct Pairs {
  Floats even, odd;
};

HYDRA_INLINE Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
HYDRA_INLINE Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
HYDRA_INLINE Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
HYDRA_INLINE Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
HYDRA_INLINE Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
HYDRA_INLINE Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
HYDRA_INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
HYDRA_INLINE Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
HYDRA_INLINE __m256 nearest(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HYDRA_INLINE Floats nearest(Floats x) { return {nearest(x.low), nearest(x.high)}; }

HYDRA_INLINE float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
HYDRA_INLINE float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// One bit for each lane, the first the lowest.
HYDRA_INLINE uint32_t bits(__m256 low, __m256 high) { return _mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8; }
HYDRA_INLINE uint32_t greater(Floats a, Floats b) {
  return bits(_mm256_cmp_ps(a.low, b.low, _CMP_GT_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_GT_OQ));
}
HYDRA_INLINE uint32_t equal(Floats a, Floats b) {
  return bits(_mm256_cmp_ps(a.low, b.low, _CMP_EQ_OQ), _mm256_cmp_ps(a.high, b.high, _CMP_EQ_OQ));
}

// x * 2^whole where `given` is greater than `least`, else 0. The power is multiplied in two halves: one factor could not hold it.
HYDRA_INLINE __m256 times_power_where(__m256 x, __m256 whole, __m256 given, float least) {
  const __m256i power = _mm256_cvtps_epi32(_mm256_min_ps(whole, _mm256_set1_ps(256.0f)));
  const __m256i half = _mm256_srai_epi32(power, 1), other = _mm256_sub_epi32(power, half);
  const auto factor = [](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)); };
  const __m256 product = _mm256_mul_ps(_mm256_mul_ps(x, factor(half)), factor(other));
  return _mm256_and_ps(product, _mm256_cmp_ps(given, _mm256_set1_ps(least), _CMP_GT_OQ));
}
HYDRA_INLINE Floats times_power_where(Floats x, Floats whole, Floats given, float least) {
  return {times_power_where(x.low, whole.low, given.low, least), times_power_where(x.high, whole.high, given.high, least)};
}

// Eight bfloat16 values as float32.
HYDRA_INLINE __m256 widen(__m128i values) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16)); }
// Eight float32 values rounded to the nearest bfloat16, to even among two, in the low half of each lane; no number stays none.
HYDRA_INLINE __m256i round_to_bf16(__m256 values) {
  const __m256i given = _mm256_castps_si256(values), top = _mm256_srli_epi32(given, 16);
  const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(given, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_or_si256(top, _mm256_set1_epi32(0x40)), none);
}
HYDRA_INLINE __m256i narrow(Floats values) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(values.low), round_to_bf16(values.high));
  return _mm256_permute4x64_epi64(packed, 0xd8);  // packing goes by halves of a register
}

HYDRA_INLINE Floats load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
HYDRA_INLINE Floats load(const Value* at) {
  return {widen(_mm_loadu_si128((const __m128i*)at)), widen(_mm_loadu_si128((const __m128i*)(at + 8)))};
}
HYDRA_INLINE Floats load(const at::Half* at) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(at + 8)))};
}
HYDRA_INLINE void store(float* at, Floats values) {
  _mm256_storeu_ps(at, values.low);
  _mm256_storeu_ps(at + 8, values.high);
}
HYDRA_INLINE void store(Value* at, Floats values) { _mm256_storeu_si256((__m256i*)at, narrow(values)); }

// Only the first `count` values are in memory; the others are read as 0.
template <typename T>
HYDRA_INLINE Floats load_first(const T* at, int64_t count) {
  if (count >= 16) return load(at);
  T values[16] = {};
  std::copy_n(at, count, values);
  return load(values);
}
template <typename T>
HYDRA_INLINE void store_first(T* at, Floats given, int64_t count) {
  if (count >= 16) return store(at, given);
  T values[16];
  store(values, given);
  std::copy_n(values, count, at);
}
// `x` in the first `count` lanes, `rest` in the others.
HYDRA_INLINE Floats first_of(Floats x, int64_t count, Floats rest) {
  if (count >= 16) return x;
  const __m256i wanted = _mm256_set1_epi32(count), lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(wanted, lanes));
  const __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(wanted, _mm256_add_epi32(lanes, _mm256_set1_epi32(8))));
  return {_mm256_blendv_ps(rest.low, x.low, low), _mm256_blendv_ps(rest.high, x.high, high)};
}

// The first and the second bfloat16 value of each of eight pairs.
HYDRA_INLINE __m256 even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
HYDRA_INLINE __m256 odd_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(0xffff0000))); }
HYDRA_INLINE Pairs as_pairs(__m256i low, __m256i high) { return {{even_of(low), even_of(high)}, {odd_of(low), odd_of(high)}}; }
// The two values at `at` in every lane.
HYDRA_INLINE Pairs broadcast_pair(const Value* at) { return {all(static_cast<float>(at[0])), all(static_cast<float>(at[1]))}; }
HYDRA_INLINE Floats dot(Floats sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }

// Transpose eight lines' 32-bit values `offset` to `offset` + 7.
HYDRA_INLINE void load_transposed_8x8(const int32_t* const* lines, int64_t offset, __m256i* transposed) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_si256((const __m256i*)(lines[i] + offset));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    transposed[i] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    transposed[i + 4] = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
  }
}

// The transpose of sixteen lines' pairs `offset` to `offset` + 15: lane i of each holds a pair of line i.
HYDRA_INLINE void load_transposed_pairs(const int32_t* const* lines, int64_t offset, Pairs* transposed) {
  for (int64_t part = 0; part < 16; part += 8) {
    __m256i low[8], high[8];
    load_transposed_8x8(lines, offset + part, low);
    load_transposed_8x8(lines + 8, offset + part, high);
    for (int i = 0; i < 8; ++i) transposed[part + i] = as_pairs(low[i], high[i]);
  }
}

}  // namespace simd
