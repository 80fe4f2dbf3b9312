// One block of a product of few rows with a matrix in bfloat16 or in 4 bits, by AVX-512's dot product of bfloat16.
#pragma once

#include <ATen/ATen.h>

#include "simd.h"

#ifdef HYDRA_AVX512
namespace simd {

using Input = Value;              // what a row of `x` is made of
constexpr int MAX_ROWS = 12;      // rows that are computed together: two sums for each, and the other registers for weights
constexpr int MAX_ROWS_INT4 = 6;  // the same in 4 bits: two sums of a group and two totals for each

HYDRA_INLINE Tensor as_input(const Tensor& x) { return x; }

// Start the sums of a block's 32 outputs, for each row, at the bias.
template <int ROWS>
HYDRA_INLINE void init_sums(Floats (&sums)[ROWS][2], const Value* bias) {
  unrolled<2>([&](auto half) {
    const Floats first = bias ? load(bias + 16 * half) : zeros();
    unrolled<ROWS>([&](auto row) { sums[row][half] = first; });
  });
}

// Round the sums to bfloat16 and store them; `out`: from a row of `target` to the next.
template <int ROWS>
HYDRA_INLINE void store_sums(const Floats (&sums)[ROWS][2], Value* target, int64_t out) {
  unrolled<ROWS>([&](auto row) {
    unrolled<2>([&](auto half) { store(target + row * out + 16 * half, sums[row][half]); });
  });
}

// One block of 32 outputs for ROWS rows, by dot products of AVX-512.
template <int ROWS>
void dot_product_block(const Input* x, int64_t in, const Value* weight, const Value* bias, Value* target, int64_t out) {
  Floats sums[ROWS][2];
  init_sums(sums, bias);
  for (int64_t k = 0; k < in; k += 2, weight += 2 * BLOCK) {
    const Pairs low = load_pairs(weight), high = load_pairs(weight + BLOCK);
    unrolled<ROWS>([&](auto row) {
      const Pairs values = broadcast_pair(x + row * in + k);
      sums[row][0] = dot(sums[row][0], low, values);
      sums[row][1] = dot(sums[row][1], high, values);
    });
  }
  store_sums(sums, target, out);
}

// The values 0 to 15 in bfloat16, twice: the five bits of the index are a code and the lowest bit of the code above it.
alignas(64) constexpr uint16_t CODE_VALUES[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};

// As `int4_block` in `matmul_int4.h`.
template <int ROWS>
void int4_block(const Value* x, const float* sums, int64_t in, const int16_t* codes, const at::Half* scales, const Value* bias,
                Value* target, int64_t out) {
  const int64_t groups = in / GROUP;
  const __m512i values = _mm512_load_si512(CODE_VALUES);
  Floats total[ROWS][2];
  init_sums(total, bias);
  for (int64_t group = 0; group < groups; ++group, scales += 2 * BLOCK) {
    Floats group_sums[ROWS][2];
    init_sums(group_sums, nullptr);
    for (int64_t part = 0; part < GROUP / 8; ++part, codes += 64) {
      const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 32);
      unrolled<4>([&](auto pair_index) {
        const Pairs first = as_pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4 * pair_index), values));
        const Pairs second = as_pairs(_mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4 * pair_index), values));
        unrolled<ROWS>([&](auto row) {
          const Pairs given = broadcast_pair(x + row * in + group * GROUP + part * 8 + 2 * pair_index);
          group_sums[row][0] = dot(group_sums[row][0], first, given);
          group_sums[row][1] = dot(group_sums[row][1], second, given);
        });
      });
    }
    unrolled<2>([&](auto half) {
      const Floats scale = load(scales + 16 * half), minimum = load(scales + BLOCK + 16 * half);
      unrolled<ROWS>([&](auto row) {
        const Floats sum = all(sums[row * groups + group]);
        total[row][half] = fma(scale, group_sums[row][half], fma(minimum, sum, total[row][half]));
      });
    });
  }
  store_sums(total, target, out);
}

}  // namespace simd
#endif
