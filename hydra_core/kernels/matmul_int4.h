// Products of few rows with matrices of 4-bit codes (GGUF's Q4_1): a weight is scale * code + minimum, with one scale and
// one minimum for each group of 32 inputs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <optional>
#include <vector>

#include "matmul_bf16.h"
#include "simd.h"

#ifdef HYDRA_AVX512
namespace avx512 {

constexpr int64_t GROUP = 32;     // inputs that share a scale and a minimum
constexpr int MAX_ROWS_INT4 = 6;  // rows that are computed together: two sums of a group and two totals for each

// The values 0 to 15 in bfloat16, twice: the five bits of the index are a code and the lowest bit of the code above it.
inline __m512i code_values() {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = at::BFloat16(static_cast<float>(i % 16)).x;
  return _mm512_load_si512(values);
}

// One block of 32 outputs for ROWS rows. `codes`: [in / 8, 2, 16, 2] int16 of four codes each, those of inputs 2 j and
// 2 j + 1 in bits 4 j; `scales`: [in / 32, 2, 32] float16, scale and minimum; `sums`: [ROWS, in / 32] of x over each group.
template <int ROWS>
void int4_block(const Value* x, const float* sums, int64_t in, const int16_t* codes, const at::Half* scales, const Value* bias,
                Value* target, int64_t out, __m512i values) {
  const int64_t groups = in / GROUP;
  __m512 total[ROWS][2];
  init_sums(total, bias);
  for (int64_t group = 0; group < groups; ++group, scales += 2 * BLOCK) {
    __m512 group_sums[ROWS][2];
    for (int row = 0; row < ROWS; ++row) group_sums[row][0] = group_sums[row][1] = _mm512_setzero_ps();
    for (int64_t part = 0; part < GROUP / 8; ++part, codes += 64) {
      const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 32);
#pragma GCC unroll 4
      for (int pair_index = 0; pair_index < 4; ++pair_index) {
        const __m512bh first = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4 * pair_index), values));
        const __m512bh second = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4 * pair_index), values));
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
          const __m512bh given = broadcast_pair(x + row * in + group * GROUP + part * 8 + 2 * pair_index);
          group_sums[row][0] = _mm512_dpbf16_ps(group_sums[row][0], first, given);
          group_sums[row][1] = _mm512_dpbf16_ps(group_sums[row][1], second, given);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + 16 * half)));
      const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + BLOCK + 16 * half)));
      for (int row = 0; row < ROWS; ++row) {
        const __m512 sum = _mm512_set1_ps(sums[row * groups + group]);
        total[row][half] = _mm512_fmadd_ps(scale, group_sums[row][half], _mm512_fmadd_ps(minimum, sum, total[row][half]));
      }
    }
  }
  store_sums(total, target, out);
}

inline void int4_block_of(int64_t rows, const Value* x, const float* sums, int64_t in, const int16_t* codes,
                          const at::Half* scales, const Value* bias, Value* target, int64_t out, __m512i values) {
  switch (rows) {
#define ROWS_CASE(n) case n: return int4_block<n>(x, sums, in, codes, scales, bias, target, out, values)
    ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4); ROWS_CASE(5); ROWS_CASE(6);
#undef ROWS_CASE
  }
}

// `x`: [M, in]; `codes`: [out / 32, in / 8, 2, 16, 2] int16; `scales`: [out / 32, in / 32, 2, 32] float16. Returns [M, out].
inline Tensor linear_int4(const Tensor& given, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = codes.size(0), out = blocks * BLOCK, groups = in / GROUP;
  Tensor result = at::empty({count, out}, x.options());
  const Value* from = x.const_data_ptr<Value>();
  std::vector<float> sums(count * groups);
  for (int64_t i = 0; i < count * groups; ++i) {
    sums[i] = _mm512_reduce_add_ps(_mm512_add_ps(load16(from + i * GROUP), load16(from + i * GROUP + 16)));
  }
  const int16_t* all_codes = codes.const_data_ptr<int16_t>();
  const at::Half* all_scales = scales.const_data_ptr<at::Half>();
  const Value* biases = bias ? bias->const_data_ptr<Value>() : nullptr;
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const __m512i values = code_values();
    for (int64_t block = begin; block < end; ++block) {
      in_passes(count, MAX_ROWS_INT4, [&](int64_t at, int64_t some) {
        int4_block_of(some, from + at * in, sums.data() + at * groups, in, all_codes + block * in * 8,
                      all_scales + block * groups * 2 * BLOCK, biases ? biases + block * BLOCK : nullptr,
                      target + at * out + block * BLOCK, out, values);
      });
    }
  });
  return result;
}

}  // namespace avx512
#endif
