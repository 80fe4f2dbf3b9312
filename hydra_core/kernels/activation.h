// SiLU and what follows it: the product with an MLP's gate, the sum with a draft head's residual.
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

// SiLU(x) * other (MUL), or SiLU(x) + other, of `width` values; computed in float32 and rounded once.
template <bool MUL>
void silu_epilogue(const Value* x, const Value* other, Value* target, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) {
    const Floats value = silu(load_first(x + i, width - i)), more = load_first(other + i, width - i);
    store_first(target + i, MUL ? value * more : value + more, width - i);
  }
}

// SiLU(gate) * up in float32, rounded once: [M, 2 I] to [M, I].
inline Tensor silu_and_mul(const Tensor& gate_up) {
  const int64_t count = gate_up.size(0), inner = gate_up.size(1) / 2;
  Tensor result = at::empty({count, inner}, gate_up.options());
  const Value* from = gate_up.const_data_ptr<Value>();
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, count, std::max<int64_t>(1, MIN_WORK / (64 * inner)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Value* gates = from + row * 2 * inner;
      silu_epilogue<true>(gates, gates + inner, target + row * inner, inner);
    }
  });
  return result;
}

}  // namespace simd
#endif

namespace native {

using at::Tensor;

// x * sigmoid(x) of one value.
template <typename T>
float silu(T x) {
  const float value = static_cast<float>(x);
  return value / (1.0f + std::exp(-value));
}

// SiLU(gate) * up: [M, 2 I] to [M, I]. Computed in float32 and rounded once, since the input of an MLP's last matrix decides
// most of a step's rounding.
template <typename T>
Tensor silu_and_mul(const Tensor& gate_up) {
#ifdef HYDRA_SIMD
  if (std::is_same_v<T, at::BFloat16>) return simd::silu_and_mul(gate_up);
#endif
  std::vector<Tensor> halves = gate_up.chunk(2, -1);
  return at::silu(halves[0].to(at::kFloat)).mul_(halves[1]).to(gate_up.scalar_type());
}

}  // namespace native
