// What all vectorised kernels share: sixteen float32 values at a time, exp and SiLU, and even passes over rows.
//
// HYDRA_AVX512 is defined where the processor has AVX-512's bf16 dot product, HYDRA_AMX where it has AMX tiles besides, HYDRA_AVX2
// where it has AVX2 and none of them, and HYDRA_SIMD in all three cases. Kernels are written with the functions of
// `simd_avx512.h`, which `simd_avx2.h` offers too.
// oneDNN and PyTorch's attention are made for many rows: for the one to a few dozen rows of a decoding step they read memory
// at half its speed, which is why these kernels exist. They sum in float32, and a row's sums are taken in the same order
// whatever rows are computed with it, so a row's result does not depend on the batch.
#pragma once

// Values of sixteen lanes are arguments and results of functions: one that is not inlined would pass them in memory.
#define HYDRA_INLINE __attribute__((always_inline)) inline

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HYDRA_AVX512 1
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HYDRA_AMX 1
#endif
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HYDRA_AVX2 1
#include "simd_avx2.h"
#endif

#if defined(HYDRA_AVX512) || defined(HYDRA_AVX2)
#define HYDRA_SIMD 1

#include <ATen/ATen.h>

#include <type_traits>
#include <utility>

namespace simd {

using at::Tensor;

constexpr int64_t MIN_WORK = 1 << 18;  // multiplications that are worth another thread
constexpr int64_t BLOCK = 32;          // outputs of a matrix that are computed together
constexpr int64_t GROUP = 32;          // inputs of a matrix of 4-bit codes that share a scale and a minimum

// e^x, exact to the last bits of float32; 0 below -87.
HYDRA_INLINE Floats exponential(Floats x) {
  const Floats scaled = x * all(1.44269504088896341f), whole = nearest(scaled);
  const Floats part = (scaled - whole) * all(0.693147180559945309f);
  Floats sum = all(1.0f / 720);
  for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = fma(sum, part, all(next));
  return times_power_where(sum, whole, x, -87.0f);
}

// x * sigmoid(x).
HYDRA_INLINE Floats silu(Floats value) { return value / (all(1.0f) + exponential(zeros() - value)); }

// Call `run` with 0 to COUNT - 1 as constants. Of an array that is indexed by constants the compiler keeps every value in a register;
// it unrolls a loop too late for that, and stores the values in each round.
template <int COUNT, typename Run>
HYDRA_INLINE void unrolled(Run run) {
  [&]<int... INDEX>(std::integer_sequence<int, INDEX...>) __attribute__((always_inline)) {
    (run(std::integral_constant<int, INDEX>()), ...);
  }(std::make_integer_sequence<int, COUNT>());
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

}  // namespace simd
#endif
