// Few rows against large matrices, and attention of a few queries, in bfloat16 with AVX-512's own dot product, the matrices
// with AMX's tiles where there are any.
//
// oneDNN and torch's attention are made for many rows: at the one to a few dozen rows of a decoding step they read memory
// at half its speed. Sums are kept in float32, and a row's are taken in the same order whatever rows go with it.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define HYDRA_ROWS 1

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HYDRA_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "lines.h"
#include "pages.h"

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
  return pages::copy(weight.view({out / BLOCK, BLOCK, in / 2, 2}).permute({0, 2, 1, 3}));
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

// ---- the same with tiles: sixteen rows against sixteen outputs, thirty-two inputs at a time --------------------------------

constexpr int64_t LINE = 32;        // inputs of a row that a tile holds
constexpr int64_t AHEAD = 4 * 32 * 32;  // of the weights that are asked for before they are needed
constexpr int64_t MOST_TILED = 32;  // rows that are made together: two tiles of them, against two of outputs

// Tile instructions do not tell the compiler what they read: all that was written is to be in memory before them.
inline void written() { asm volatile("" ::: "memory"); }

// Whether this process may use them. Linux asks to be asked: their state is large.
inline bool tiles_allowed() {
#ifdef HYDRA_TILES
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
#else
  return false;
#endif
}

inline bool tiled(int64_t in) { return in % LINE == 0 && tiles_allowed(); }

// The tiles' shapes as they are set in this thread, for `rows` rows; given back at the end.
struct Shaped {
  int64_t rows = 0;
#ifdef HYDRA_TILES
  ~Shaped() {
    if (rows) _tile_release();
  }

  // 0 to 3: sums, 4 and 5: rows, 6 and 7: outputs.
  void set(int64_t wanted) {
    if (rows == wanted) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t lines[16] = {};
    } shapes;
    const int64_t low = std::min<int64_t>(wanted, 16), high = wanted - low;
    const auto shape = [&](int tile, int64_t lines) { shapes.bytes[tile] = lines ? 64 : 0, shapes.lines[tile] = lines; };
    shape(0, low), shape(1, low), shape(4, low), shape(2, high), shape(3, high), shape(5, high), shape(6, 16), shape(7, 16);
    written();
    _tile_loadconfig(&shapes);
    rows = wanted;
  }
#endif
};

#ifdef HYDRA_TILES
// Sums [16 or 32, 32] of a block's outputs. `MORE`: there are more than sixteen rows; `FRESH`: the block comes from memory, not
// from the cache, where asking ahead for it would take as long as reading it.
template <bool MORE, bool FRESH>
void sums_of(const Value* x, int64_t in, const Value* weight, float* sums) {
  const int64_t line = in * sizeof(Value);
  written();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MORE) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < in; k += LINE, weight += LINE * BLOCK) {
    if constexpr (FRESH)
      for (int64_t ahead = 0; ahead < LINE * BLOCK; ahead += 32) _mm_prefetch(weight + AHEAD + ahead, _MM_HINT_T0);
    _tile_loadd(6, weight, 4 * BLOCK);
    _tile_loadd(7, weight + BLOCK, 4 * BLOCK);
    _tile_loadd(4, x + k, line);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (MORE) {
      _tile_loadd(5, x + 16 * in + k, line);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 4 * BLOCK);
  _tile_stored(1, sums + 16, 4 * BLOCK);
  if constexpr (MORE) {
    _tile_stored(2, sums + 16 * BLOCK, 4 * BLOCK);
    _tile_stored(3, sums + 16 * BLOCK + 16, 4 * BLOCK);
  }
}
#endif

// One block's outputs for up to `most(in)` rows.
inline int64_t most(int64_t in) { return tiled(in) ? MOST_TILED : MOST; }

// `fresh`: nothing was made of it yet.
inline void block_of(int64_t rows, const Value* x, int64_t in, const Value* weight, const Value* bias, Value* target, int64_t out,
                     bool fresh, Shaped& shaped) {
#ifdef HYDRA_TILES
  if (tiled(in)) {
    alignas(64) float sums[MOST_TILED * BLOCK];
    shaped.set(rows);
    if (rows <= 16)
      sums_of<false, true>(x, in, weight, sums);
    else
      fresh ? sums_of<true, true>(x, in, weight, sums) : sums_of<true, false>(x, in, weight, sums);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t half = 0; half < BLOCK; half += 16) {
        const __m512 sum = _mm512_load_ps(sums + row * BLOCK + half);
        keep(target + row * out + half, bias ? _mm512_add_ps(sum, sixteen(bias + half)) : sum);
      }
    return;
  }
#endif
  tile_of(rows, x, in, weight, bias, target, out);
}

constexpr int64_t CACHED = 256;  // rows that a matrix goes by at once
constexpr int64_t BESIDE = 8;    // blocks that do so together then, for each of the rows that are made together

// `x`: [M, in]; `packed`: of `pack`; `bias`: [out]. Returns [M, out].
inline Tensor linear(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = packed.size(0), out = blocks * BLOCK;
  Tensor result = at::empty({count, out}, x.options());
  const Value *values = x.const_data_ptr<Value>(), *weights = packed.const_data_ptr<Value>();
  const Value* added = bias ? bias->const_data_ptr<Value>() : nullptr;
  Value* target = result.data_ptr<Value>();
  // Of many rows a part at a time, to stay near while the matrix goes by: a prompt's rows would have to be read again for every
  // block. Parts are as even as they go, large enough for the matrix's way from memory, and pieces enough for every thread.
  const int64_t parts = (count + CACHED - 1) / CACHED;
  const int64_t spare = parts * blocks / (4 * at::get_num_threads());
  const int64_t beside = parts > 1 ? std::clamp<int64_t>(spare, 1, BESIDE) : 1, groups = (blocks + beside - 1) / beside;
  at::parallel_for(0, parts * groups, 1, [&](int64_t begin, int64_t end) {
    Shaped shaped;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t part = piece / groups, group = piece % groups * beside;
      const int64_t first = count * part / parts, last = count * (part + 1) / parts;
      in_passes(last - first, most(in), [&](int64_t offset, int64_t some) {
        const int64_t at = first + offset;
        for (int64_t block = group; block < std::min(blocks, group + beside); ++block)
          block_of(some, values + at * in, in, weights + block * in * BLOCK, added ? added + block * BLOCK : nullptr,
                   target + at * out + block * BLOCK, out, offset == 0, shaped);
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
  std::vector<float> tops(pieces * count, -INFINITY);
  std::vector<int64_t> where(pieces * count, 0);
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Value made[MOST_TILED * BLOCK];
    Shaped shaped;
    for (int64_t piece = begin; piece < end; ++piece) {
      for (int64_t block = blocks * piece / pieces; block < blocks * (piece + 1) / pieces; ++block) {
        in_passes(count, most(in), [&](int64_t at, int64_t some) {
          block_of(some, values + at * in, in, weights + block * in * BLOCK, added ? added + block * BLOCK : nullptr, made, BLOCK,
                   at == 0, shaped);
          for (int64_t row = 0; row < some; ++row) {
            const __m512 low = sixteen(made + row * BLOCK), high = sixteen(made + row * BLOCK + 16);
            const float best = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
            float& known = tops[piece * count + at + row];
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
      if (tops[piece * count + row] > tops[best * count + row]) best = piece;
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

inline __m512 silu(__m512 value) {
  return _mm512_div_ps(value, _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), value))));
}

// carried + SiLU(made), or SiLU(made) * other, of `width` values; one rounding.
template <bool GATE>
inline void epilogue(const Value* made, const Value* other, Value* target, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 inside = width - i >= 16 ? 0xffff : (1 << (width - i)) - 1;
    const __m512 value = silu(widen(_mm256_maskz_loadu_epi16(inside, made + i)));
    const __m512 more = widen(_mm256_maskz_loadu_epi16(inside, other + i));
    _mm256_mask_storeu_epi16(target + i, inside, narrow(GATE ? _mm512_mul_ps(value, more) : _mm512_add_ps(value, more)));
  }
}

// SiLU(gate) * up in float32, rounded once: [M, 2 I] to [M, I].
inline Tensor gate(const Tensor& made) {
  const int64_t count = made.size(0), inner = made.size(1) / 2;
  Tensor result = at::empty({count, inner}, made.options());
  const Value* from = made.const_data_ptr<Value>();
  Value* target = result.data_ptr<Value>();
  at::parallel_for(0, count, std::max<int64_t>(1, WORK / (64 * inner)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Value* gates = from + row * 2 * inner;
      epilogue<true>(gates, gates + inner, target + row * inner, inner);
    }
  });
  return result;
}

// The `count` largest of `size` scores in order, ties to the first, and their probabilities among all.
inline void top_k(const Value* scores, int64_t size, int64_t count, int64_t* index, float* chance) {
  std::fill_n(chance, count, -INFINITY);
  std::fill_n(index, count, 0);
  for (int64_t at = 0; at < size; at += 16) {
    const __mmask16 inside = size - at >= 16 ? 0xffff : (1 << (size - at)) - 1;
    const __m512 values = widen(_mm256_maskz_loadu_epi16(inside, scores + at));
    uint32_t larger = _mm512_mask_cmp_ps_mask(inside, values, _mm512_set1_ps(chance[count - 1]), _CMP_GT_OQ);
    for (; larger; larger &= larger - 1) {
      const int64_t i = at + __builtin_ctz(larger);
      const float value = static_cast<float>(scores[i]);
      if (!(value > chance[count - 1])) continue;  // no longer, after those before it
      int64_t place = count - 1;
      for (; place > 0 && value > chance[place - 1]; --place) {
        chance[place] = chance[place - 1];
        index[place] = index[place - 1];
      }
      chance[place] = value;
      index[place] = i;
    }
  }
  __m512 sum = _mm512_setzero_ps();
  const __m512 most = _mm512_set1_ps(chance[0]);
  for (int64_t at = 0; at < size; at += 16) {
    const __mmask16 inside = size - at >= 16 ? 0xffff : (1 << (size - at)) - 1;
    const __m512 values = _mm512_sub_ps(widen(_mm256_maskz_loadu_epi16(inside, scores + at)), most);
    sum = _mm512_mask_add_ps(sum, inside, sum, exponential(values));
  }
  const float all = _mm512_reduce_add_ps(sum), top = chance[0];
  for (int64_t i = 0; i < count; ++i) chance[i] = std::exp(chance[i] - top) / all;
}

// As `add_and_norm` of native.cpp.
inline void norm(float* stream, const Value* added, const float* weight, Value* normed, int64_t rows, int64_t width, float eps) {
  at::parallel_for(0, rows, std::max<int64_t>(1, WORK / (32 * width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* at = stream + row * width;
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

// Rows of `table` [V, D] for `ids`, each brought to a root mean square of one: [..., D].
inline Tensor embedded(const Tensor& table, const Tensor& ids, double eps) {
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
      _mm256_mask_storeu_epi16(target + i, inside, narrow(_mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(inside, from + i)), scale)));
    }
  }
  return result;
}

// As `turn` of native.cpp, of a head without a norm whose width is a multiple of 32.
inline void turn(const Value* head, const Value* cos, const Value* sin, Value* target, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; i += 16) {
    const __m512 low = sixteen(head + i), high = sixteen(head + half + i);
    keep(target + i, _mm512_sub_ps(_mm512_mul_ps(low, sixteen(cos + i)), _mm512_mul_ps(high, sixteen(sin + i))));
    keep(target + half + i,
         _mm512_add_ps(_mm512_mul_ps(high, sixteen(cos + half + i)), _mm512_mul_ps(low, sixteen(sin + half + i))));
  }
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Sixteen lines of sixteen 32-bit values, turned; `a` is used up.
inline void turn_lines(__m512i* a, __m512i* turned) {
  __m512i b[16];
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

inline void turn16(const int32_t* const* lines, int64_t offset, __m512i* turned) {
  __m512i a[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(lines[i] + offset);
  turn_lines(a, turned);
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

// The first of `count` mask values that is not 0, or `count`.
inline int64_t first_closed(const Value* mask, int64_t count) {
  int64_t slot = 0;
  for (; slot + 32 <= count; slot += 32) {
    const __mmask32 closed = _mm512_test_epi16_mask(_mm512_loadu_si512(mask + slot), _mm512_set1_epi16(-1));
    if (closed) return slot + __builtin_ctz(closed);
  }
  while (slot < count && mask[slot].x == 0) ++slot;
  return slot;
}

#ifdef HYDRA_TILES
// ---- attention with tiles: sixteen queries at a time, slots down and queries across -----------------------------------------

constexpr int64_t SIDE = 16;  // lines of a tile, and 32-bit values of one

// What a thread needs for one head's sixteen queries: [slots, 16] float scores and [16, slots] weights, slots to a multiple of 32.
struct Workspace {
  std::vector<float> scores;
  std::vector<Value> weights;
  alignas(64) int32_t queries[256 / 2][SIDE];
  alignas(64) Value pairs[SIDE][2 * 64];
  alignas(64) Value last[2 * SIDE][256];
  alignas(64) float sums[SIDE][64];

  void fit(int64_t slots) {
    scores.resize(slots * SIDE);
    weights.resize(slots * SIDE);
  }
};

// `count` queries [count, width] by pairs of a head's width, for all of a tile's columns: [width / 2, 16] pairs.
inline void turn_queries(const Value* queries, int64_t count, int64_t width, Workspace& work) {
  alignas(64) static const int32_t none[128] = {};
  const int32_t* lines[SIDE];
  for (int64_t i = 0; i < SIDE; ++i) lines[i] = i < count ? reinterpret_cast<const int32_t*>(queries + i * width) : none;
  __m512i turned[SIDE];
  for (int64_t at = 0; at < width / 2; at += SIDE) {
    turn16(lines, at, turned);
    for (int64_t i = 0; i < SIDE; ++i) _mm512_store_si512(work.queries[at + i], turned[i]);
  }
}

// Products of 32 slots' keys with the queries, to `scores` [32, 16].
inline void products(const Value* keys, int64_t stride, int64_t width, const Workspace& work, float* scores) {
  written();
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t at = 0; at < width; at += LINE) {
    _tile_loadd(6, work.queries[at / 2], 4 * SIDE);
    _tile_loadd(4, keys + at, stride * sizeof(Value));
    _tile_loadd(5, keys + SIDE * stride + at, stride * sizeof(Value));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, scores, 4 * SIDE);
  _tile_stored(1, scores + SIDE * SIDE, 4 * SIDE);
}

// Scores [slots, 16] of the head's span, scaled and masked; what lies past it is -inf. Returns each query's largest.
inline __m512 score_tiled(const Head& head, int64_t slots, const Value* mask, int64_t open, int64_t first, int64_t count,
                          int64_t nodes, int64_t line, float scale, Workspace& work) {
  float* scores = work.scores.data();
  for (int64_t slot = 0; slot < slots; slot += 2 * SIDE) {
    const int64_t there = std::min(head.span - slot, 2 * SIDE);
    if (there == 2 * SIDE) {
      products(head.keys + slot * head.stride, head.stride, head.width, work, scores + slot * SIDE);
      continue;
    }
    for (int64_t i = 0; i < 2 * SIDE; ++i)  // past the span there may be no memory
      if (i < there) std::copy_n(head.keys + (slot + i) * head.stride, head.width, work.last[i]);
      else std::fill_n(work.last[i], head.width, Value(0));
    products(work.last[0], 256, head.width, work, scores + slot * SIDE);
  }
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 most = _mm512_set1_ps(-INFINITY);
  const int64_t free = std::min(open / SIDE * SIDE, head.span / SIDE * SIDE);
  for (int64_t slot = 0; slot < free; ++slot) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(scores + slot * SIDE), factor);
    _mm512_storeu_ps(scores + slot * SIDE, value);
    most = _mm512_max_ps(most, value);
  }
  for (int64_t slot = free; slot < slots; slot += SIDE) {
    __m512i added[SIDE];
    alignas(64) int32_t lines[SIDE][SIDE];
    const int32_t* each[SIDE];
    const int64_t there = std::max<int64_t>(0, std::min(head.span - slot, SIDE));
    const __mmask16 inside = (1u << there) - 1;
    for (int64_t query = 0; query < SIDE; ++query) {
      const Value* from = mask && query < count ? mask + (first + query) % nodes * line + slot : nullptr;
      const __m512 values = from ? widen(_mm256_maskz_loadu_epi16(inside, from)) : _mm512_setzero_ps();
      _mm512_store_ps(reinterpret_cast<float*>(lines[query]), _mm512_mask_blend_ps(inside, _mm512_set1_ps(-INFINITY), values));
      each[query] = lines[query];
    }
    turn16(each, 0, added);
    for (int64_t i = 0; i < SIDE; ++i) {
      float* at = scores + (slot + i) * SIDE;
      const __m512 value = _mm512_fmadd_ps(_mm512_loadu_ps(at), factor, _mm512_castsi512_ps(added[i]));
      _mm512_storeu_ps(at, value);
      most = _mm512_max_ps(most, value);
    }
  }
  return most;
}

// Scores to weights that sum to what is returned, turned: [16, slots].
inline __m512 soften_tiled(int64_t slots, __m512 most, Workspace& work) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t slot = 0; slot < slots; slot += SIDE) {
    __m512i made[SIDE], turned[SIDE];
    for (int64_t i = 0; i < SIDE; ++i) {
      const __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(work.scores.data() + (slot + i) * SIDE), most));
      sum = _mm512_add_ps(sum, weight);
      made[i] = _mm512_castps_si512(weight);
    }
    turn_lines(made, turned);
    for (int64_t query = 0; query < SIDE; ++query) keep(work.weights.data() + query * slots + slot, _mm512_castsi512_ps(turned[query]));
  }
  return sum;
}

// 32 slots' values by pairs of slots, `64` of the head's width from `at` on or the 32 that are left: [16, 64 or 32, 2].
inline void pair_values(const Head& head, int64_t slot, int64_t at, int64_t wide, Workspace& work) {
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i)
    for (int half = 0; half < 2; ++half) order[half][i] = i / 2 + 16 * half + 32 * (i % 2);
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int64_t two = 0; two < SIDE; ++two) {
    const int64_t first = slot + 2 * two;
    for (int64_t i = 0; i < wide; i += 32) {
      const Value* from = head.values + first * head.stride + at + i;
      const __m512i a = first < head.span ? _mm512_loadu_si512(from) : _mm512_setzero_si512();
      const __m512i b = first + 1 < head.span ? _mm512_loadu_si512(from + head.stride) : _mm512_setzero_si512();
      _mm512_store_si512(work.pairs[two] + 2 * i, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(work.pairs[two] + 2 * i + 32, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// The queries' weighted values, 64 of the head's width from `at` on or the 32 that are left: `sums` [16, 64].
template <bool WIDE>
void mix_tiled(const Head& head, int64_t at, int64_t slots, Workspace& work) {
  constexpr int64_t BYTES = sizeof(work.pairs[0]);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (WIDE) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t slot = 0; slot < slots; slot += 2 * SIDE) {
    pair_values(head, slot, at, WIDE ? 64 : 32, work);
    written();
    _tile_loadd(4, work.weights.data() + slot, slots * sizeof(Value));
    _tile_loadd(6, work.pairs[0], BYTES);
    _tile_loadd(7, work.pairs[0] + 32, BYTES);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (WIDE) {
      _tile_loadd(6, work.pairs[0] + 64, BYTES);
      _tile_loadd(7, work.pairs[0] + 96, BYTES);
      _tile_dpbf16ps(2, 4, 6);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, work.sums[0], 4 * 64);
  _tile_stored(1, work.sums[0] + 16, 4 * 64);
  if constexpr (WIDE) {
    _tile_stored(2, work.sums[0] + 32, 4 * 64);
    _tile_stored(3, work.sums[0] + 48, 4 * 64);
  }
}

// Up to sixteen queries [count, width] of one head; each one's result into a line of its own.
inline void attend_tiled(const Head& head, const Value* queries, int64_t first, int64_t count, const Value* mask, int64_t open,
                         int64_t nodes, int64_t line, float scale, Value* const* targets, Workspace& work) {
  const int64_t slots = (head.span + 2 * SIDE - 1) / (2 * SIDE) * (2 * SIDE);
  work.fit(slots);
  turn_queries(queries, count, head.width, work);
  const __m512 most = score_tiled(head, slots, mask, open, first, count, nodes, line, scale, work);
  alignas(64) float shares[SIDE];
  _mm512_store_ps(shares, _mm512_div_ps(_mm512_set1_ps(1.0f), soften_tiled(slots, most, work)));
  for (int64_t at = 0; at < head.width; at += 64) {
    const int64_t wide = std::min<int64_t>(head.width - at, 64);
    wide == 64 ? mix_tiled<true>(head, at, slots, work) : mix_tiled<false>(head, at, slots, work);
    for (int64_t query = 0; query < count; ++query)
      for (int64_t i = 0; i < wide; i += 16)
        keep(targets[query] + at + i, _mm512_mul_ps(_mm512_load_ps(work.sums[query] + i), _mm512_set1_ps(shares[query])));
  }
}
#endif

// Of one head and row: `count` of its queries, from `first` on.
struct Piece {
  int64_t row, head, first, count;
};

// `queries`: for each row [H, G * n, d] of its n nodes, one row's after another's; `lines`: where each row's begin and how many
// they are; `keys`, `values`: [B, S, H, d] of which the first `span` slots are read; `mask`: [B, 1, N, span] additive; `slots`:
// [B, N] where the nodes themselves stand, after all that their row may look at. Returns [M, H * G * d], the order in which the
// output matrix reads it.
inline Tensor attend(const Tensor& queries, const Lines& lines, const Tensor& keys, const Tensor& values, int64_t span,
                     const Tensor& slots, const std::optional<Tensor>& mask) {
  const int64_t batch = slots.size(0), nodes = slots.size(1), heads = keys.size(2), width = keys.size(3);
  const int64_t groups = queries.numel() / (lines.total * heads * width), all = heads * groups * width;
  const bool tiles = tiled(width) && width <= 256;
  const int64_t most = tiles ? 16 : QUERIES;
  Tensor result = at::empty({lines.total, all}, queries.options());
  const Tensor masked = mask ? mask->contiguous() : Tensor();
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Value* target = result.data_ptr<Value>();
  std::vector<int64_t> open(batch, span);  // slots at a row's beginning that all its nodes look at
  std::vector<Piece> pieces;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t node = 0; tiles && mask && node < lines.count[row]; ++node)
      open[row] = first_closed(masked.const_data_ptr<Value>() + (row * nodes + node) * span, open[row]);
    for (int64_t head = 0; head < heads; ++head)
      in_passes(groups * lines.count[row], most, [&](int64_t first, int64_t some) { pieces.push_back({row, head, first, some}); });
  }
  const int64_t asked = std::min(most, groups * lines.total / batch + 1);  // of a head at once, about
  const int64_t grain = std::max<int64_t>(1, WORK / (2 * asked * span * width + 1));
  at::parallel_for(0, pieces.size(), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(tiles ? 0 : QUERIES * (span + 15));
#ifdef HYDRA_TILES
    Shaped shaped;
    thread_local Workspace work;
    if (tiles) shaped.set(MOST_TILED);
#endif
    for (int64_t task = begin; task < end; ++task) {
      const auto [row, kv, first, count] = pieces[task];
      const int64_t own_nodes = lines.count[row], folded = groups * own_nodes;
      const int64_t own = slots.const_data_ptr<int64_t>()[row * nodes + own_nodes - 1] + 1, padded = (own + 15) / 16 * 16;
      const Head head{keys.const_data_ptr<Value>() + row * keys.stride(0) + kv * keys.stride(2),
                      values.const_data_ptr<Value>() + row * values.stride(0) + kv * values.stride(2), keys.stride(1), own, width};
      const Value* asked = queries.const_data_ptr<Value>() + (lines.first[row] * heads * groups + kv * folded + first) * width;
      const Value* hidden = mask ? masked.const_data_ptr<Value>() + row * nodes * span : nullptr;
      Value* targets[16];
      for (int64_t query = 0; query < count; ++query) {
        const int64_t group = (first + query) / own_nodes, node = (first + query) % own_nodes;
        targets[query] = target + (lines.first[row] + node) * all + (kv * groups + group) * width;
      }
#ifdef HYDRA_TILES
      if (tiles) {
        attend_tiled(head, asked, first, count, hidden, open[row], own_nodes, span, scale, targets, work);
        continue;
      }
#endif
      score(head, asked, first, count, hidden, own_nodes, span, scale, scores.data(), padded);
      for (int64_t query = 0; query < count; ++query) soften(scores.data() + query * padded, padded);
      for (int64_t query = 0; query < count;) {
        const float* weights = scores.data() + query * padded;
        if (count - query >= 4) mix<4>(head, weights, padded, targets + query), query += 4;
        else if (count - query >= 2) mix<2>(head, weights, padded, targets + query), query += 2;
        else mix<1>(head, weights, padded, targets + query), query += 1;
      }
    }
  });
  return result;
}

}  // namespace few
#endif
