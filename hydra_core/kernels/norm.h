// RMSNorm: of the residual after an addition, and of token embeddings.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

// As `native::fused_add_rms_norm`.
inline void fused_add_rms_norm(float* residual, const Value* added, const float* weight, Value* normed, int64_t rows,
                               int64_t width, float eps) {
  at::parallel_for(0, rows, std::max<int64_t>(1, MIN_WORK / (32 * width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* at = residual + row * width;
      Floats squares = zeros();
      for (int64_t i = 0; i < width; i += 16) {
        Floats value = load_first(at + i, width - i);
        if (added) {
          value = value + load_first(added + row * width + i, width - i);
          store_first(at + i, value, width - i);
        }
        squares = fma(value, value, squares);
      }
      const Floats scale = all(1.0f / std::sqrt(sum(squares) / width + eps));
      for (int64_t i = 0; i < width; i += 16)
        store_first(normed + row * width + i, load_first(at + i, width - i) * scale * load_first(weight + i, width - i), width - i);
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
    Floats squares = zeros();
    for (int64_t i = 0; i < width; i += 16) {
      const Floats value = load_first(from + i, width - i);
      squares = fma(value, value, squares);
    }
    const Floats scale = all(1.0f / std::sqrt(sum(squares) / width + static_cast<float>(eps)));
    for (int64_t i = 0; i < width; i += 16) store_first(target + i, load_first(from + i, width - i) * scale, width - i);
  }
  return result;
}

}  // namespace simd
#endif

namespace native {

// Add `added` [M, D], if not null, to the residual [M, D] in place; then normed = x / rms(x) * weight for each row of it.
template <typename T>
void fused_add_rms_norm(float* residual, const T* added, const float* weight, T* normed, int64_t rows, int64_t width,
                               double eps) {
#ifdef HYDRA_SIMD
  if constexpr (std::is_same_v<T, at::BFloat16>)
    return simd::fused_add_rms_norm(residual, added, weight, normed, rows, width, eps);
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
