// Products of few rows with matrices of 4-bit codes (GGUF's Q4_1): a weight is scale * code + minimum, with one scale and
// one minimum for each group of 32 inputs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <optional>
#include <vector>

#include "matmul_avx2.h"
#include "matmul_avx512.h"
#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

// One block of 32 outputs for `rows` rows. `codes`: [in / 8, 2, 16, 2] int16 of four codes each, those of inputs 2 j and
// 2 j + 1 in bits 4 j; `scales`: [in / 32, 2, 32] float16, scale and minimum; `sums`: [rows, in / 32] of x over each group.
inline void int4_block_of(int64_t rows, const Input* x, const float* sums, int64_t in, const int16_t* codes,
                          const at::Half* scales, const Value* bias, Value* target, int64_t out) {
  switch (rows) {
#define ROWS_CASE(n) case n: return int4_block<n>(x, sums, in, codes, scales, bias, target, out)
    ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4);
#ifdef HYDRA_AVX512
    ROWS_CASE(5); ROWS_CASE(6);
#endif
#undef ROWS_CASE
  }
}

// `x`: [M, in]; `codes`: [out / 32, in / 8, 2, 16, 2] int16; `scales`: [out / 32, in / 32, 2, 32] float16. Returns [M, out].
inline Tensor linear_int4(const Tensor& given, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = codes.size(0), out = blocks * BLOCK, groups = in / GROUP;
  Tensor result = at::empty({count, out}, x.options());
  const Tensor input = as_input(x);
  const Input* from = input.const_data_ptr<Input>();
  std::vector<float> sums(count * groups);
  for (int64_t i = 0; i < count * groups; ++i) sums[i] = sum(load(from + i * GROUP) + load(from + i * GROUP + 16));
  const int16_t* all_codes = codes.const_data_ptr<int16_t>();
  const at::Half* all_scales = scales.const_data_ptr<at::Half>();
  const Value* biases = bias ? bias->const_data_ptr<Value>() : nullptr;
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      in_passes(count, MAX_ROWS_INT4, [&](int64_t at, int64_t some) {
        int4_block_of(some, from + at * in, sums.data() + at * groups, in, all_codes + block * in * 8,
                      all_scales + block * groups * 2 * BLOCK, biases ? biases + block * BLOCK : nullptr,
                      target + at * out + block * BLOCK, out);
      });
    }
  });
  return result;
}

}  // namespace simd
#endif
