// Few rows against large matrices, and attention of a few queries, in bfloat16 with AVX-512's own dot product.
//
// oneDNN and torch's attention are made for many rows: at the one to a few dozen rows of a decoding step they read memory
// at half its speed. Sums are kept in float32, and a row's are taken in the same order whatever rows go with it.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HYDRA_ROWS 1

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace few {

using at::Tensor;
using Value = at::BFloat16;

constexpr int64_t BLOCK = 32;      // outputs of a matrix that are made together: two registers
constexpr int MOST = 12;           // rows that are: two sums each, and the rest for weights
constexpr int64_t QUERIES = 12;    // queries of a head that share its keys once turned
constexpr int64_t WORK = 1 << 18;  // multiplications that are worth another thread

inline __m512 widen(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }
inline __m256i narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
inline __m512 sixteen(const Value* at) { return widen(_mm256_loadu_si256((const __m256i*)at)); }
inline void keep(Value* at, __m512 values) { _mm256_storeu_si256((__m256i*)at, narrow(values)); }
inline __m512bh both(__m512i values) { return (__m512bh)values; }
inline __m512bh pair(const Value* at) { return both(_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(at))); }

// e^x to float32's last bits, and 0 far below.
inline __m512 exponential(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 whole = _mm512_roundscale_ps(scaled, 0);
  const __m512 part = _mm512_mul_ps(_mm512_sub_ps(scaled, whole), _mm512_set1_ps(0.693147180559945309f));
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(next));
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ);
  return _mm512_maskz_scalef_ps(counts, sum, whole);
}

// ---- a matrix -------------------------------------------------------------------------------------------------------

// [out, in] to [out / 32, in / 2, 32, 2]: what one step of the sum reads lies together.
inline Tensor pack(const Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1);
  TORCH_CHECK(out % BLOCK == 0 && in % 2 == 0, "a matrix of ", out, " x ", in);
  return weight.view({out / BLOCK, BLOCK, in / 2, 2}).permute({0, 2, 1, 3}).contiguous();
}

// Sums of a block's outputs for each row, as they start (at the bias) and as they are kept.
template <int ROWS>
inline void start(__m512 (&sums)[ROWS][2], const Value* bias) {
  for (int half = 0; half < 2; ++half) {
    const __m512 first = bias ? sixteen(bias + 16 * half) : _mm512_setzero_ps();
    for (int row = 0; row < ROWS; ++row) sums[row][half] = first;
  }
}

template <int ROWS>
inline void finish(const __m512 (&sums)[ROWS][2], Value* target, int64_t out) {
  for (int row = 0; row < ROWS; ++row)
    for (int half = 0; half < 2; ++half) keep(target + row * out + 16 * half, sums[row][half]);
}

// `run(at, some)` for `count` rows, at most `most` of them at once and as even as it goes.
template <typename Run>
inline void in_passes(int64_t count, int64_t most, const Run& run) {
  const int64_t passes = (count + most - 1) / most;
  for (int64_t pass = 0, at = 0; pass < passes; ++pass) {
    const int64_t some = (count - at) / (passes - pass);
    run(at, some);
    at += some;
  }
}

template <int ROWS>
void tile(const Value* x, int64_t in, const Value* weight, const Value* bias, Value* target, int64_t out) {
  __m512 sums[ROWS][2];
  start(sums, bias);
  for (int64_t k = 0; k < in; k += 2, weight += 2 * BLOCK) {
    const __m512bh low = both(_mm512_loadu_si512(weight)), high = both(_mm512_loadu_si512(weight + BLOCK));
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row) {
      const __m512bh values = pair(x + row * in + k);
      sums[row][0] = _mm512_dpbf16_ps(sums[row][0], low, values);
      sums[row][1] = _mm512_dpbf16_ps(sums[row][1], high, values);
    }
  }
  finish(sums, target, out);
}

inline void tile_of(int64_t rows, const Value* x, int64_t in, const Value* weight, const Value* bias, Value* target, int64_t out) {
  switch (rows) {
#define ROWS_CASE(n) case n: return tile<n>(x, in, weight, bias, target, out)
    ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4); ROWS_CASE(5); ROWS_CASE(6);
    ROWS_CASE(7); ROWS_CASE(8); ROWS_CASE(9); ROWS_CASE(10); ROWS_CASE(11); ROWS_CASE(12);
#undef ROWS_CASE
  }
}

// `x`: [M, in]; `packed`: of `pack`; `bias`: [out]. Returns [M, out].
inline Tensor linear(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = packed.size(0), out = blocks * BLOCK;
  Tensor result = at::empty({count, out}, x.options());
  const Value *values = x.const_data_ptr<Value>(), *weights = packed.const_data_ptr<Value>();
  const Value* added = bias ? bias->const_data_ptr<Value>() : nullptr;
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      in_passes(count, MOST, [&](int64_t at, int64_t some) {
        tile_of(some, values + at * in, in, weights + block * in * BLOCK, added ? added + block * BLOCK : nullptr,
                target + at * out + block * BLOCK, out);
      });
    }
  });
  return result;
}

// The output that is largest in each row of `linear`'s result, of equals the first: [M] int64. Nothing else of it is kept.
inline Tensor largest(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = packed.size(0);
  const Value *values = x.const_data_ptr<Value>(), *weights = packed.const_data_ptr<Value>();
  const Value* added = bias ? bias->const_data_ptr<Value>() : nullptr;
  const int64_t pieces = std::max<int64_t>(1, std::min<int64_t>(blocks, at::get_num_threads()));
  std::vector<float> most(pieces * count, -INFINITY);
  std::vector<int64_t> where(pieces * count, 0);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Value made[MOST * BLOCK];
    for (int64_t piece = begin; piece < end; ++piece) {
      for (int64_t block = blocks * piece / pieces; block < blocks * (piece + 1) / pieces; ++block) {
        in_passes(count, MOST, [&](int64_t at, int64_t some) {
          tile_of(some, values + at * in, in, weights + block * in * BLOCK, added ? added + block * BLOCK : nullptr, made, BLOCK);
          for (int64_t row = 0; row < some; ++row) {
            const __m512 low = sixteen(made + row * BLOCK), high = sixteen(made + row * BLOCK + 16);
            const float best = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
            float& known = most[piece * count + at + row];
            if (!(best > known)) continue;  // of equals the first stays
            known = best;
            const __m512 wanted = _mm512_set1_ps(best);
            const uint32_t equal = _mm512_cmpeq_ps_mask(low, wanted) | static_cast<uint32_t>(_mm512_cmpeq_ps_mask(high, wanted)) << 16;
            where[piece * count + at + row] = block * BLOCK + __builtin_ctz(equal);
          }
        });
      }
    }
  });
  Tensor result = at::empty({count}, x.options().dtype(at::kLong));
  for (int64_t row = 0; row < count; ++row) {
    int64_t best = 0;
    for (int64_t piece = 1; piece < pieces; ++piece)
      if (most[piece * count + row] > most[best * count + row]) best = piece;
    result.data_ptr<int64_t>()[row] = where[best * count + row];
  }
  return result;
}

// ---- a matrix in 4 bits ---------------------------------------------------------------------------------------------

constexpr int64_t GROUP = 32;  // inputs that share a scale and a minimum
constexpr int MOST4 = 6;       // rows that are summed together: two sums of a group and two of all each

// The values 0 to 15 in bfloat16, twice: a code is looked up with the lowest bit of its neighbour above it.
inline __m512i code_values() {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) values[i] = at::BFloat16(static_cast<float>(i % 16)).x;
  return _mm512_load_si512(values);
}

// `codes`: of one block, [in / 8, 2, 16, 2] of four codes each, those of inputs 2 j and 2 j + 1 in bits 4 j; `scales`: [in / 32,
// 2, 32] float16, scale and minimum; `sums`: [ROWS, in / 32] of x over each group. A weight is scale * code + minimum.
template <int ROWS>
void tile4(const Value* x, const float* sums, int64_t in, const int16_t* codes, const at::Half* scales, const Value* bias,
           Value* target, int64_t out, __m512i values) {
  const int64_t groups = in / GROUP;
  __m512 total[ROWS][2];
  start(total, bias);
  for (int64_t group = 0; group < groups; ++group, scales += 2 * BLOCK) {
    __m512 made[ROWS][2];
    for (int row = 0; row < ROWS; ++row) made[row][0] = made[row][1] = _mm512_setzero_ps();
    for (int64_t eight = 0; eight < GROUP / 8; ++eight, codes += 64) {
      const __m512i low = _mm512_loadu_si512(codes), high = _mm512_loadu_si512(codes + 32);
#pragma GCC unroll 4
      for (int two = 0; two < 4; ++two) {
        const __m512bh first = both(_mm512_permutexvar_epi16(_mm512_srli_epi16(low, 4 * two), values));
        const __m512bh second = both(_mm512_permutexvar_epi16(_mm512_srli_epi16(high, 4 * two), values));
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; ++row) {
          const __m512bh given = pair(x + row * in + group * GROUP + eight * 8 + 2 * two);
          made[row][0] = _mm512_dpbf16_ps(made[row][0], first, given);
          made[row][1] = _mm512_dpbf16_ps(made[row][1], second, given);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + 16 * half)));
      const __m512 least = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(scales + BLOCK + 16 * half)));
      for (int row = 0; row < ROWS; ++row) {
        const __m512 sum = _mm512_set1_ps(sums[row * groups + group]);
        total[row][half] = _mm512_fmadd_ps(scale, made[row][half], _mm512_fmadd_ps(least, sum, total[row][half]));
      }
    }
  }
  finish(total, target, out);
}

inline void tile4_of(int64_t rows, const Value* x, const float* sums, int64_t in, const int16_t* codes, const at::Half* scales,
                     const Value* bias, Value* target, int64_t out, __m512i values) {
  switch (rows) {
#define ROWS_CASE(n) case n: return tile4<n>(x, sums, in, codes, scales, bias, target, out, values)
    ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4); ROWS_CASE(5); ROWS_CASE(6);
#undef ROWS_CASE
  }
}

// `x`: [M, in]; `codes`: [out / 32, in / 8, 2, 16, 2] int16; `scales`: [out / 32, in / 32, 2, 32] float16. Returns [M, out].
inline Tensor linear4(const Tensor& given, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = codes.size(0), out = blocks * BLOCK, groups = in / GROUP;
  Tensor result = at::empty({count, out}, x.options());
  const Value* from = x.const_data_ptr<Value>();
  std::vector<float> sums(count * groups);
  for (int64_t i = 0; i < count * groups; ++i) {
    sums[i] = _mm512_reduce_add_ps(_mm512_add_ps(sixteen(from + i * GROUP), sixteen(from + i * GROUP + 16)));
  }
  const int16_t* all_codes = codes.const_data_ptr<int16_t>();
  const at::Half* all_scales = scales.const_data_ptr<at::Half>();
  const Value* added = bias ? bias->const_data_ptr<Value>() : nullptr;
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const __m512i values = code_values();
    for (int64_t block = begin; block < end; ++block) {
      in_passes(count, MOST4, [&](int64_t at, int64_t some) {
        tile4_of(some, from + at * in, sums.data() + at * groups, in, all_codes + block * in * 8, all_scales + block * groups * 2 * BLOCK,
                 added ? added + block * BLOCK : nullptr, target + at * out + block * BLOCK, out, values);
      });
    }
  });
  return result;
}

// SiLU(gate) * up in float32, rounded once: [M, 2 I] to [M, I].
inline Tensor gate(const Tensor& made) {
  const int64_t count = made.size(0), inner = made.size(1) / 2;
  Tensor result = at::empty({count, inner}, made.options());
  const Value* from = made.const_data_ptr<Value>();
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, count, std::max<int64_t>(1, WORK / (8 * inner)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Value *gates = from + row * 2 * inner, *ups = gates + inner;
      for (int64_t i = 0; i < inner; i += 16) {
        const __mmask16 inside = inner - i >= 16 ? 0xffff : (1 << (inner - i)) - 1;
        const __m512 value = widen(_mm256_maskz_loadu_epi16(inside, gates + i));
        const __m512 up = widen(_mm256_maskz_loadu_epi16(inside, ups + i));
        const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), value)));
        _mm256_mask_storeu_epi16(target + row * inner + i, inside, narrow(_mm512_mul_ps(_mm512_div_ps(value, below), up)));
      }
    }
  });
  return result;
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Sixteen lines of sixteen 32-bit values, turned.
inline void turn16(const int32_t* const* lines, int64_t offset, __m512i* turned) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(lines[i] + offset);
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
    const __m512i low2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88), high2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    turned[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
    turned[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    turned[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
    turned[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

// One head's keys and values of one row: `stride` from a slot to the next, `span` slots that the row itself has filled,
// `width` a multiple of 32.
struct Head {
  const Value *keys, *values;
  int64_t stride, span, width;
};

// Scores [count, padded] of queries [count, width]; what lies past the span is -inf. `mask`: [nodes, `line`] additive.
inline void score(const Head& head, const Value* queries, int64_t first, int64_t count, const Value* mask, int64_t nodes,
                  int64_t line, float scale, float* scores, int64_t padded) {
  const int64_t pairs = head.width / 2;
  std::vector<__m512i> turned(pairs);
  for (int64_t slot = 0; slot < head.span; slot += 16) {
    const int32_t* lines[16];
    for (int64_t i = 0; i < 16; ++i)
      lines[i] = reinterpret_cast<const int32_t*>(head.keys + std::min(slot + i, head.span - 1) * head.stride);
    for (int64_t at = 0; at < pairs; at += 16) turn16(lines, at, turned.data() + at);
    const __mmask16 inside = head.span - slot >= 16 ? 0xffff : (1 << (head.span - slot)) - 1;
    for (int64_t query = 0; query < count; ++query) {
      const Value* values = queries + query * head.width;
      __m512 sum = _mm512_setzero_ps(), other = _mm512_setzero_ps();
      for (int64_t at = 0; at < pairs; at += 2) {
        sum = _mm512_dpbf16_ps(sum, both(turned[at]), pair(values + 2 * at));
        other = _mm512_dpbf16_ps(other, both(turned[at + 1]), pair(values + 2 * at + 2));
      }
      sum = _mm512_mul_ps(_mm512_add_ps(sum, other), _mm512_set1_ps(scale));
      if (mask) sum = _mm512_add_ps(sum, widen(_mm256_maskz_loadu_epi16(inside, mask + (first + query) % nodes * line + slot)));
      _mm512_storeu_ps(scores + query * padded + slot, _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), sum));
    }
  }
}

// Scores to weights that sum to one.
inline void soften(float* scores, int64_t padded) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < padded; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top));
    sum = _mm512_add_ps(sum, weight);
    _mm512_storeu_ps(scores + i, weight);
  }
  const __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
  for (int64_t i = 0; i < padded; i += 16) _mm512_storeu_ps(scores + i, _mm512_mul_ps(_mm512_loadu_ps(scores + i), scale));
}

// `COUNT` queries' weighted values, 32 of a head's width at a time; each query's into a line of its own.
template <int COUNT>
void mix(const Head& head, const float* weights, int64_t padded, Value* const* targets) {
  for (int64_t at = 0; at < head.width; at += 32) {
    __m512 sums[COUNT][2];
    for (int query = 0; query < COUNT; ++query) sums[query][0] = sums[query][1] = _mm512_setzero_ps();
    for (int64_t slot = 0; slot < head.span; ++slot) {
      const Value* from = head.values + slot * head.stride + at;
      const __m512 low = sixteen(from), high = sixteen(from + 16);
      for (int query = 0; query < COUNT; ++query) {
        const __m512 weight = _mm512_set1_ps(weights[query * padded + slot]);
        sums[query][0] = _mm512_fmadd_ps(weight, low, sums[query][0]);
        sums[query][1] = _mm512_fmadd_ps(weight, high, sums[query][1]);
      }
    }
    for (int query = 0; query < COUNT; ++query)
      for (int half = 0; half < 2; ++half)
        keep(targets[query] + at + 16 * half, sums[query][half]);
  }
}

// `queries`: [B, H, G * N, d]; `keys`, `values`: [B, S, H, d] of which the first `span` slots are read; `mask`: [B, 1, N, span]
// additive; `slots`: [B, N] where the nodes themselves stand, after all that their row may look at. Returns [B * N, H * G * d],
// the order in which the output matrix reads it.
inline Tensor attend(const Tensor& queries, const Tensor& keys, const Tensor& values, int64_t span, const Tensor& slots,
                     const std::optional<Tensor>& mask) {
  const int64_t nodes = slots.size(1);
  const int64_t batch = queries.size(0), heads = queries.size(1), folded = queries.size(2), width = queries.size(3);
  const int64_t groups = folded / nodes, all = heads * groups * width, pieces = (folded + QUERIES - 1) / QUERIES;
  const int64_t* last = slots.const_data_ptr<int64_t>() + nodes - 1;
  Tensor result = at::empty({batch * nodes, all}, queries.options());
  const Tensor masked = mask ? mask->contiguous() : Tensor();
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Value* target = result.data_ptr<Value>();
  const int64_t grain = std::max<int64_t>(1, WORK / (2 * std::min(folded, QUERIES) * span * width + 1));
  at::parallel_for(0, batch * heads * pieces, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(QUERIES * (span + 15));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / (heads * pieces), kv = task / pieces % heads, piece = task % pieces;
      const int64_t first = folded * piece / pieces, count = folded * (piece + 1) / pieces - first;
      const int64_t own = last[row * nodes] + 1, padded = (own + 15) / 16 * 16;
      const Head head{keys.const_data_ptr<Value>() + row * keys.stride(0) + kv * keys.stride(2),
                      values.const_data_ptr<Value>() + row * values.stride(0) + kv * values.stride(2), keys.stride(1), own, width};
      score(head, queries.const_data_ptr<Value>() + ((row * heads + kv) * folded + first) * width, first, count,
            mask ? masked.const_data_ptr<Value>() + row * nodes * span : nullptr, nodes, span, scale, scores.data(), padded);
      Value* lines[QUERIES];
      for (int64_t query = 0; query < count; ++query) {
        soften(scores.data() + query * padded, padded);
        const int64_t group = (first + query) / nodes, node = (first + query) % nodes;
        lines[query] = target + (row * nodes + node) * all + (kv * groups + group) * width;
      }
      for (int64_t query = 0; query < count;) {
        const float* weights = scores.data() + query * padded;
        if (count - query >= 4) mix<4>(head, weights, padded, lines + query), query += 4;
        else if (count - query >= 2) mix<2>(head, weights, padded, lines + query), query += 2;
        else mix<1>(head, weights, padded, lines + query), query += 1;
      }
    }
  });
  return result;
}

}  // namespace few
#endif
