// One block of a product of few rows with a matrix in bfloat16 or in 4 bits, by AVX2: rows are given in float32, and a weight is
// widened once for all rows that are computed together.
#pragma once

#include <ATen/ATen.h>

#include "simd.h"

#ifdef HYDRA_AVX2
namespace simd {

using Input = float;               // what a row of `x` is made of
constexpr int MAX_ROWS = 4;        // rows that are computed together: eight sums keep both units busy, twelve are spilled to memory
constexpr int MAX_ROWS_INT4 = 4;   // the same in 4 bits
constexpr int WHOLE = 2;           // rows up to which a whole block is computed at once, and not half of it
constexpr int64_t AHEAD = 64 * 2 * BLOCK;  // weights from the one that is read to the one that is prefetched
constexpr int EIGHT = 8;           // outputs of one register

HYDRA_INLINE Tensor as_input(const Tensor& x) { return x.to(at::kFloat); }

// Start the sums of `PARTS` registers of outputs at the bias.
template <int ROWS, int PARTS>
HYDRA_INLINE void init_sums(__m256 (&sums)[ROWS][PARTS], const Value* bias) {
  unrolled<PARTS>([&](auto part) {
    const __m256 first = bias ? widen(_mm_loadu_si128((const __m128i*)(bias + part * EIGHT))) : _mm256_setzero_ps();
    unrolled<ROWS>([&](auto row) { sums[row][part] = first; });
  });
}

// Round the sums to bfloat16 and store them; `out`: from a row of `target` to the next.
template <int ROWS, int PARTS>
HYDRA_INLINE void store_sums(const __m256 (&sums)[ROWS][PARTS], Value* target, int64_t out) {
  unrolled<ROWS>([&](auto row) {
    unrolled<PARTS / 2>([&](auto two) {
      store(target + row * out + two * 2 * EIGHT, {sums[row][2 * two], sums[row][2 * two + 1]});
    });
  });
}

// Add the products of one input, `values`, with each row's `x[row * in]` to the sums.
template <int ROWS, int PARTS>
HYDRA_INLINE void add_products(__m256 (&sums)[ROWS][PARTS], const __m256 (&values)[PARTS], const float* x,
                                                        int64_t in) {
  unrolled<ROWS>([&](auto row) {
    const __m256 given = _mm256_broadcast_ss(x + row * in);
    unrolled<PARTS>([&](auto part) { sums[row][part] = _mm256_fmadd_ps(values[part], given, sums[row][part]); });
  });
}

// `PARTS` registers of a block's outputs for ROWS rows. `weight`: from the first of these outputs on. `FRESH`: the block comes from
// memory, and all of it is prefetched.
template <int ROWS, int PARTS, bool FRESH>
void dot_product_part(const float* x, int64_t in, const Value* weight, const Value* bias, Value* target, int64_t out) {
  __m256 sums[ROWS][PARTS];
  init_sums(sums, bias);
  for (int64_t k = 0; k < in; k += 2, weight += 2 * BLOCK) {
    const Value* at = weight;
    if constexpr (FRESH) {
      _mm_prefetch(weight + AHEAD, _MM_HINT_T0);
      _mm_prefetch(weight + AHEAD + BLOCK, _MM_HINT_T0);
    }
    const auto pairs = [&](int part) { return _mm256_loadu_si256((const __m256i*)(at + 2 * EIGHT * part)); };
    __m256 values[PARTS];
    unrolled<PARTS>([&](auto part) { values[part] = even_of(pairs(part)); });
    add_products(sums, values, x + k, in);
    asm volatile("" : "+r"(at));  // read the pairs again: the sums leave no registers to keep them
    unrolled<PARTS>([&](auto part) { values[part] = odd_of(pairs(part)); });
    add_products(sums, values, x + k + 1, in);
  }
  store_sums(sums, target, out);
}

// A block of 32 outputs for ROWS rows.
template <int ROWS>
void dot_product_block(const float* x, int64_t in, const Value* weight, const Value* bias, Value* target, int64_t out) {
  if constexpr (ROWS <= WHOLE) return dot_product_part<ROWS, 4, true>(x, in, weight, bias, target, out);
  dot_product_part<ROWS, 2, true>(x, in, weight, bias, target, out);
  dot_product_part<ROWS, 2, false>(x, in, weight + BLOCK, bias ? bias + 16 : nullptr, target + 16, out);
}

// `PARTS` registers of a block's outputs for ROWS rows by 4-bit codes; arguments as of `int4_block`, from the first of these
// outputs on.
template <int ROWS, int PARTS>
void int4_part(const float* x, const float* sums, int64_t in, const int16_t* codes, const at::Half* scales, const Value* bias,
               Value* target, int64_t out) {
  const int64_t groups = in / GROUP;
  const __m256i lowest = _mm256_set1_epi32(15);
  __m256 total[ROWS][PARTS];
  init_sums(total, bias);
  for (int64_t group = 0; group < groups; ++group, scales += 2 * BLOCK) {
    __m256 group_sums[ROWS][PARTS];
    init_sums(group_sums, nullptr);
    for (int64_t eighth = 0; eighth < GROUP / 8; ++eighth, codes += 64)
      unrolled<8>([&](auto input) {  // the codes of even inputs are in the low half of a lane
        constexpr int SHIFT = 4 * (input / 2) + 16 * (input % 2);
        __m256 values[PARTS];
        unrolled<PARTS>([&](auto part) {
          const __m256i packed = _mm256_loadu_si256((const __m256i*)(codes + 16 * part));
          values[part] = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(packed, SHIFT), lowest));
        });
        add_products(group_sums, values, x + group * GROUP + eighth * 8 + input, in);
      });
    unrolled<PARTS>([&](auto part) {
      const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + part * EIGHT)));
      const __m256 minimum = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(scales + BLOCK + part * EIGHT)));
      unrolled<ROWS>([&](auto row) {
        const __m256 given = _mm256_set1_ps(sums[row * groups + group]);
        total[row][part] = _mm256_fmadd_ps(scale, group_sums[row][part], _mm256_fmadd_ps(minimum, given, total[row][part]));
      });
    });
  }
  store_sums(total, target, out);
}

// As `int4_block` in `matmul_int4.h`.
template <int ROWS>
void int4_block(const float* x, const float* sums, int64_t in, const int16_t* codes, const at::Half* scales, const Value* bias,
                Value* target, int64_t out) {
  if constexpr (ROWS <= WHOLE) return int4_part<ROWS, 4>(x, sums, in, codes, scales, bias, target, out);
  else
    for (int half = 0; half < BLOCK; half += 16)
      int4_part<ROWS, 2>(x, sums, in, codes + 2 * half, scales + half, bias ? bias + half : nullptr, target + half, out);
}

}  // namespace simd
#endif
