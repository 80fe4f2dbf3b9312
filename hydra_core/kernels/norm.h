// RMSNorm: of the residual after an addition, and of token embeddings.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "simd.h"

#ifdef HYDRA_AVX512
namespace avx512 {

// As `native::fused_add_rms_norm`.
inline void fused_add_rms_norm(float* residual, const Value* added, const float* weight, Value* normed, int64_t rows,
                               int64_t width, float eps) {
  at::parallel_for(0, rows, std::max<int64_t>(1, MIN_WORK / (32 * width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* at = residual + row * width;
      __m512 squares = _mm512_setzero_ps();
      for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 inside = width - i >= 16 ? 0xffff : (1 << (width - i)) - 1;
        __m512 value = _mm512_maskz_loadu_ps(inside, at + i);
        if (added) {
          value = _mm512_add_ps(value, widen(_mm256_maskz_loadu_epi16(inside, added + row * width + i)));
          _mm512_mask_storeu_ps(at + i, inside, value);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
      }
      const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
      for (int64_t i = 0; i < width; i += 16) {
        const __mmask16 inside = width - i >= 16 ? 0xffff : (1 << (width - i)) - 1;
        const __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_loadu_ps(inside, at + i), scale),
                                           _mm512_maskz_loadu_ps(inside, weight + i));
        _mm256_mask_storeu_epi16(normed + row * width + i, inside, narrow(value));
      }
    }
  });
}

// Rows of `table` [V, D] for `ids` [...], each RMS-normalised without a weight: [..., D].
inline Tensor embed_rms_norm(const Tensor& table, const Tensor& ids, double eps) {
  const int64_t width = table.size(1), count = ids.numel();
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(width);
  Tensor result = at::empty(sizes, table.options());
  const Tensor wanted = ids.contiguous();
  const int64_t* id = wanted.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < count; ++row) {
    TORCH_CHECK(id[row] >= 0 && id[row] < table.size(0), "a token id lies outside the vocabulary");
    const Value* from = table.const_data_ptr<Value>() + id[row] * width;
    Value* target = result.data_ptr<Value>() + row * width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 inside = width - i >= 16 ? 0xffff : (1 << (width - i)) - 1;
      const __m512 value = widen(_mm256_maskz_loadu_epi16(inside, from + i));
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + static_cast<float>(eps)));
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 inside = width - i >= 16 ? 0xffff : (1 << (width - i)) - 1;
      const __m512 value = _mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(inside, from + i)), scale);
      _mm256_mask_storeu_epi16(target + i, inside, narrow(value));
    }
  }
  return result;
}

}  // namespace avx512
#endif

namespace native {

// Add `added` [M, D], if not null, to the residual [M, D] in place; then normed = x / rms(x) * weight for each row of it.
template <typename T>
void fused_add_rms_norm(float* residual, const T* added, const float* weight, T* normed, int64_t rows, int64_t width,
                               double eps) {
#ifdef HYDRA_AVX512
  if constexpr (std::is_same_v<T, at::BFloat16>)
    return avx512::fused_add_rms_norm(residual, added, weight, normed, rows, width, eps);
#endif
  for (int64_t row = 0; row < rows; ++row, residual += width, normed += width) {
    float squares = 0;
    if (added) {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) {
        residual[i] += static_cast<float>(added[i]);
        squares += residual[i] * residual[i];
      }
      added += width;
    } else {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += residual[i] * residual[i];
    }
    const float scale = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) normed[i] = static_cast<T>(residual[i] * scale * weight[i]);
  }
}

}  // namespace native
