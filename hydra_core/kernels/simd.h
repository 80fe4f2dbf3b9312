// What all AVX-512 kernels share: bfloat16 loads and stores, exp and SiLU, a 16 x 16 transpose, and even passes over rows.
//
// HYDRA_AVX512 is defined where the processor has AVX-512's bf16 dot product, HYDRA_AMX where it has AMX tiles besides.
// oneDNN and PyTorch's attention are made for many rows: for the one to a few dozen rows of a decoding step they read memory
// at half its speed, which is why these kernels exist. They sum in float32, and a row's sums are taken in the same order
// whatever rows are computed with it, so a row's result does not depend on the batch.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HYDRA_AVX512 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HYDRA_AMX 1
#endif

#include <ATen/ATen.h>

#include <immintrin.h>

namespace avx512 {

using at::Tensor;
using Value = at::BFloat16;

constexpr int64_t MIN_WORK = 1 << 18;  // multiplications that are worth another thread

// Sixteen bfloat16 values as float32, and back with rounding to nearest.
inline __m512 widen(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }
inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
inline __m512 load16(const Value* at) { return widen(_mm256_loadu_si256((const __m256i*)at)); }
inline void store16(Value* at, __m512 values) { _mm256_storeu_si256((__m256i*)at, narrow(values)); }
// Operands of the bf16 dot product: 32 values, or the two at `at` in every 32-bit lane.
inline __m512bh as_bf16(__m512i values) { return (__m512bh)values; }
inline __m512bh broadcast_pair(const Value* at) { return as_bf16(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(at))); }

// e^x, exact to the last bits of float32; 0 below -87.
inline __m512 exponential(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 whole = _mm512_roundscale_ps(scaled, 0);
  const __m512 part = _mm512_mul_ps(_mm512_sub_ps(scaled, whole), _mm512_set1_ps(0.693147180559945309f));
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(next));
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  return _mm512_maskz_scalef_ps(counts, sum, whole);
}

// x * sigmoid(x).
inline __m512 silu(__m512 value) {
  return _mm512_div_ps(value, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), value))));
}

// Transpose sixteen lines of sixteen 32-bit values; overwrites `a`.
inline void transpose_16x16(__m512i* a, __m512i* transposed) {
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
inline void load_transposed_16x16(const int32_t* const* lines, int64_t offset, __m512i* transposed) {
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(lines[i] + offset);
  transpose_16x16(a, transposed);
}

// Call `run(at, some)` for `count` rows in passes of at most `most` rows, as even as possible.
template <typename Run>
inline void in_passes(int64_t count, int64_t most, const Run& run) {
  const int64_t passes = (count + most - 1) / most;
  for (int64_t pass = 0, at = 0; pass < passes; ++pass) {
    const int64_t some = (count - at) / (passes - pass);
    run(at, some);
    at += some;
  }
}

}  // namespace avx512
#endif
