// Products of few rows with large matrices in bfloat16: `F.linear`, and the argmax of its outputs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "amx.h"
#include "huge_pages.h"
#include "matmul_avx2.h"
#include "matmul_avx512.h"
#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

constexpr int64_t PREFETCH = 4 * 32 * 32;  // weights from the one that is read to the one that is prefetched

// Copy [out, in] to [out / 32, in / 2, 32, 2], on huge pages: what one step of the sum reads is contiguous.
inline Tensor pack_weight(const Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1);
  TORCH_CHECK(out % BLOCK == 0 && in % 2 == 0, "a matrix of ", out, " x ", in);
  return huge_pages::copy(weight.view({out / BLOCK, BLOCK, in / 2, 2}).permute({0, 2, 1, 3}));
}

inline void dot_product_block_of(int64_t rows, const Input* x, int64_t in, const Value* weight, const Value* bias,
                                 Value* target, int64_t out) {
  switch (rows) {
#define ROWS_CASE(n) case n: return dot_product_block<n>(x, in, weight, bias, target, out)
    ROWS_CASE(1); ROWS_CASE(2); ROWS_CASE(3); ROWS_CASE(4);
#ifdef HYDRA_AVX512
    ROWS_CASE(5); ROWS_CASE(6); ROWS_CASE(7); ROWS_CASE(8); ROWS_CASE(9); ROWS_CASE(10); ROWS_CASE(11); ROWS_CASE(12);
#endif
#undef ROWS_CASE
  }
}

#ifdef HYDRA_AMX
// Sums [16 or 32, 32] of a block's outputs, by AMX. `MORE`: there are more than sixteen rows; `FRESH`: the block comes from
// memory and is prefetched. From the processor's cache a prefetch would take as long as the read itself.
template <bool MORE, bool FRESH>
void tile_sums(const Value* x, int64_t in, const Value* weight, float* sums) {
  const int64_t line = in * sizeof(Value);
  compiler_barrier();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MORE) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < in; k += TILE_INPUTS, weight += TILE_INPUTS * BLOCK) {
    if constexpr (FRESH)
      for (int64_t ahead = 0; ahead < TILE_INPUTS * BLOCK; ahead += 32) _mm_prefetch(weight + PREFETCH + ahead, _MM_HINT_T0);
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

// The most rows that one call of `multiply_block` takes.
inline int64_t max_rows(int64_t in) { return uses_amx(in) ? MAX_ROWS_AMX : MAX_ROWS; }

// One block of 32 outputs for up to `max_rows(in)` rows. `fresh`: this is the block's first use.
inline void multiply_block(int64_t rows, const Input* x, int64_t in, const Value* weight, const Value* bias, Value* target,
                           int64_t out, bool fresh, TileConfig& config) {
#ifdef HYDRA_AMX
  if (uses_amx(in)) {
    alignas(64) float sums[MAX_ROWS_AMX * BLOCK];
    config.set(rows);
    if (rows <= 16)
      tile_sums<false, true>(x, in, weight, sums);
    else
      fresh ? tile_sums<true, true>(x, in, weight, sums) : tile_sums<true, false>(x, in, weight, sums);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t half = 0; half < BLOCK; half += 16) {
        const Floats sum = load(sums + row * BLOCK + half);
        store(target + row * out + half, bias ? sum + load(bias + half) : sum);
      }
    return;
  }
#endif
  dot_product_block_of(rows, x, in, weight, bias, target, out);
}

constexpr int64_t ROWS_PER_PART = 256;  // rows of `x` that stay in the processor's cache while the matrix is read
constexpr int64_t BLOCKS_PER_TASK = 8;  // blocks of a task at most, where there are more rows than that

// `x`: [M, in]; `packed`: from `pack_weight`; `bias`: [out]. Returns [M, out].
inline Tensor linear(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = packed.size(0), out = blocks * BLOCK;
  Tensor result = at::empty({count, out}, x.options());
  const Tensor input = as_input(x);
  const Input* values = input.const_data_ptr<Input>();
  const Value* weights = packed.const_data_ptr<Value>();
  const Value* biases = bias ? bias->const_data_ptr<Value>() : nullptr;
  Value* target = result.data_ptr<Value>();
  // Many rows are multiplied in parts that stay in the cache while the matrix is read; otherwise a prompt's rows would be read
  // from memory again for every block. Parts are even, large enough to hide the reads of the matrix, and cut into enough
  // tasks for every thread.
  const int64_t parts = (count + ROWS_PER_PART - 1) / ROWS_PER_PART;
  const int64_t wanted = parts * blocks / (4 * at::get_num_threads());
  const int64_t blocks_per_task = parts > 1 ? std::clamp<int64_t>(wanted, 1, BLOCKS_PER_TASK) : 1;
  const int64_t groups = (blocks + blocks_per_task - 1) / blocks_per_task;
  at::parallel_for(0, parts * groups, 1, [&](int64_t begin, int64_t end) {
    TileConfig config;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / groups, group = task % groups * blocks_per_task;
      const int64_t first = count * part / parts, last = count * (part + 1) / parts;
      in_passes(last - first, max_rows(in), [&](int64_t offset, int64_t some) {
        const int64_t at = first + offset;
        for (int64_t block = group; block < std::min(blocks, group + blocks_per_task); ++block)
          multiply_block(some, values + at * in, in, weights + block * in * BLOCK, biases ? biases + block * BLOCK : nullptr,
                         target + at * out + block * BLOCK, out, offset == 0, config);
      });
    }
  });
  return result;
}

// The index of the largest output in each row of `linear`'s result, the first among equals: [M] int64. The outputs
// themselves are not stored.
inline Tensor linear_argmax(const Tensor& given, const Tensor& packed, const std::optional<Tensor>& bias) {
  const Tensor x = given.contiguous();
  const int64_t count = x.size(0), in = x.size(1), blocks = packed.size(0);
  const Tensor input = as_input(x);
  const Input* values = input.const_data_ptr<Input>();
  const Value* weights = packed.const_data_ptr<Value>();
  const Value* biases = bias ? bias->const_data_ptr<Value>() : nullptr;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(blocks, at::get_num_threads()));
  std::vector<float> best_values(tasks * count, -INFINITY);
  std::vector<int64_t> best_indices(tasks * count, 0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Value outputs[MAX_ROWS_AMX * BLOCK];
    TileConfig config;
    for (int64_t task = begin; task < end; ++task) {
      for (int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks; ++block) {
        in_passes(count, max_rows(in), [&](int64_t at, int64_t some) {
          multiply_block(some, values + at * in, in, weights + block * in * BLOCK, biases ? biases + block * BLOCK : nullptr,
                         outputs, BLOCK, at == 0, config);
          for (int64_t row = 0; row < some; ++row) {
            const Floats low = load(outputs + row * BLOCK), high = load(outputs + row * BLOCK + 16);
            const float best = largest(max(low, high));
            float& best_so_far = best_values[task * count + at + row];
            if (!(best > best_so_far)) continue;  // the first among equals stays
            best_so_far = best;
            const uint32_t equals = equal(low, all(best)) | equal(high, all(best)) << 16;
            best_indices[task * count + at + row] = block * BLOCK + __builtin_ctz(equals);
          }
        });
      }
    }
  });
  Tensor result = at::empty({count}, x.options().dtype(at::kLong));
  for (int64_t row = 0; row < count; ++row) {
    int64_t best = 0;
    for (int64_t task = 1; task < tasks; ++task)
      if (best_values[task * count + row] > best_values[best * count + row]) best = task;
    result.data_ptr<int64_t>()[row] = best_indices[best * count + row];
  }
  return result;
}

}  // namespace simd
#endif
