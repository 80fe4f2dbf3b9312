// Rotary position embedding of one attention head, after its RMSNorm where it has one (Qwen3).
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <type_traits>

#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

// As `native::rope`, for a head without a norm whose width is a multiple of 32.
inline void rope(const Value* head, const Value* cos, const Value* sin, Value* target, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const Floats low = load(head + i), high = load(head + half + i);
    store(target + i, low * load(cos + i) - high * load(sin + i));
    store(target + half + i, high * load(cos + half + i) + low * load(sin + half + i));
  }
}

}  // namespace simd
#endif

namespace native {

constexpr int64_t MAX_HEAD_WIDTH = 512;

// Normalise one head [d], if `norm` is not null, and rotate its first half against its second by its position's tables.
template <typename T>
void rope(const T* head, const T* cos, const T* sin, const T* norm, double eps, T* target, int64_t width) {
#ifdef HYDRA_SIMD
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (!norm && width % 32 == 0) return simd::rope(head, cos, sin, target, width);
#endif
  float values[MAX_HEAD_WIDTH];
  float squares = 0;
  for (int64_t i = 0; i < width; ++i) {
    values[i] = static_cast<float>(head[i]);
    squares += values[i] * values[i];
  }
  if (norm) {
    const float scale = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
    // round where PyTorch rounds: the norm's product is a tensor of the working dtype
    for (int64_t i = 0; i < width; ++i)
      values[i] = static_cast<float>(static_cast<T>(values[i] * scale * static_cast<float>(norm[i])));
  }
  const int64_t half = width / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float low = values[i], high = values[i + half];
    target[i] = static_cast<T>(low * static_cast<float>(cos[i]) - high * static_cast<float>(sin[i]));
    target[i + half] =
        static_cast<T>(high * static_cast<float>(cos[i + half]) + low * static_cast<float>(sin[i + half]));
  }
}

}  // namespace native
