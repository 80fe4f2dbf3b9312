// One draft head, without Python between its operations.
//
// Letters: B sequences, W paths per sequence, k tokens of a path, M lines of a matrix, D width, Vd draft vocabulary.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "activation.h"
#include "linear.h"
#include "norm.h"
#include "top_k.h"

namespace native {

// A block of a draft head. The outputs of `first` are parts of width D side by side: one part for a residual block, gate and up
// for a gated block; and, where the input is wider than the output (`widens`), one more part that replaces the input in the sum.
struct Block {
  Linear first;
  std::optional<Linear> down;
  bool widens;
};

// A draft head in bfloat16: its blocks, its norm, and the base's vocabulary projection.
struct DraftHead : torch::CustomClassHolder {
  std::vector<Block> blocks;
  Maybe norm;
  double eps;
  std::optional<Linear> vocabulary;
  double scale, softcap;

  // `norm`: [D] float32 at the head's end, or nothing; `scale`, `softcap` (0 for none): of the logits.
  DraftHead(Maybe norm, double eps, double scale, double softcap) : norm(norm), eps(eps), scale(scale), softcap(softcap) {}

  // Append a block of one or two matrices, with weight, bias, codes and scales of each.
  void add(std::vector<std::vector<Maybe>> matrices, std::vector<std::tuple<int64_t, int64_t>> layouts, bool widens,
           int64_t group) {
    blocks.push_back({linear_of(matrices.at(0), layouts.at(0), group), std::nullopt, widens});
    if (matrices.size() > 1) blocks.back().down = linear_of(matrices.at(1), layouts.at(1), group);
  }

  void end(std::vector<Maybe> matrix, std::tuple<int64_t, int64_t> layout, int64_t group) {
    vocabulary = linear_of(matrix, layout, group);
  }

  // `features`: [B, D]; `path`: [B, W, k, D], or [B, W, 0, D] where the head does not read it. Logits [B, W, Vd] float32.
  Tensor logits(Tensor features, Tensor path) const {
    Tensor product = raw_logits(features, path).to(at::kFloat);
    if (scale != 1.0) product.mul_(scale);
    if (softcap != 0.0) product.div_(softcap).tanh_().mul_(softcap);
    return product.view({path.size(0), path.size(1), -1});
  }

  // The vocabulary projection's outputs, without scale and soft cap: [B * W, Vd].
  Tensor raw_logits(const Tensor& features, const Tensor& path) const {
    using T = at::BFloat16;
    const int64_t batch = path.size(0), paths = path.size(1), width = features.size(1);
    Tensor x = at::cat({features.unsqueeze(1).expand({batch, paths, width}), path.flatten(2)}, 2).flatten(0, 1);
    for (const Block& block : blocks) x = block.down ? gated<T>(block, x, width) : residual<T>(block, x, width);
    if (norm) {
      Tensor wide = x.to(at::kFloat);
      fused_add_rms_norm<T>(wide.data_ptr<float>(), nullptr, norm->data_ptr<float>(), x.data_ptr<T>(), x.size(0), width, eps);
    }
    return (*vocabulary)(x);
  }

  // The `count` largest logits of each path, in order: indices [B, W, count] int64 and their probabilities float32.
  std::tuple<Tensor, Tensor> top_k(Tensor features, Tensor path, int64_t count) const {
#ifdef HYDRA_SIMD
    if (scale == 1.0 && softcap == 0.0) return top_k_of_raw(raw_logits(features, path), path, count);
#endif
    Tensor scores = logits(features, path);
    const int64_t size = scores.size(2), lines = scores.size(0) * scores.size(1);
    count = std::min(count, size);
    Tensor indices = at::empty({scores.size(0), scores.size(1), count}, scores.options().dtype(at::kLong));
    Tensor best = at::empty({scores.size(0), scores.size(1), count}, scores.options());
    const float* from = scores.data_ptr<float>();
    int64_t* index = indices.data_ptr<int64_t>();
    float* value = best.data_ptr<float>();
    for (int64_t line = 0; line < lines; ++line, from += size, index += count, value += count)
      native::top_k(from, size, count, index, value);
    return {indices, best.sub_(scores.logsumexp(-1, true)).exp_()};
  }

#ifdef HYDRA_SIMD
  static std::tuple<Tensor, Tensor> top_k_of_raw(const Tensor& product, const Tensor& path, int64_t count) {
    const int64_t lines = product.size(0), size = product.size(1);
    count = std::min(count, size);
    Tensor indices = at::empty({path.size(0), path.size(1), count}, product.options().dtype(at::kLong));
    Tensor chances = at::empty({path.size(0), path.size(1), count}, product.options().dtype(at::kFloat));
    const at::BFloat16* from = product.const_data_ptr<at::BFloat16>();
    int64_t* index = indices.data_ptr<int64_t>();
    float* chance = chances.data_ptr<float>();
    at::parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line)
        simd::top_k(from + line * size, size, count, index + line * count, chance + line * count);
    });
    return {indices, chances};
  }
#endif

  // x + SiLU(first(x)): [M, in] to [M, D]. Where the input is wider, `first` also computes what takes x's place.
  template <typename T>
  static Tensor residual(const Block& block, const Tensor& x, int64_t width) {
    Tensor product = block.first(x), result = at::empty({x.size(0), width}, x.options());
    const int64_t step = product.size(1);
    const T *from = product.data_ptr<T>(), *carried = block.widens ? from + width : x.data_ptr<T>();
    const int64_t carried_step = block.widens ? step : width;
    T* target = result.data_ptr<T>();
    for (int64_t row = 0; row < x.size(0); ++row, from += step, carried += carried_step, target += width)
#ifdef HYDRA_SIMD
      simd::silu_epilogue<false>(from, carried, target, width);
#else
      for (int64_t i = 0; i < width; ++i) target[i] = static_cast<T>(static_cast<float>(carried[i]) + silu(from[i]));
#endif
    return result;
  }

  // x + down(SiLU(gate) * up), with gate and up from `first`: [M, in] to [M, D].
  template <typename T>
  static Tensor gated(const Block& block, const Tensor& x, int64_t width) {
    Tensor product = block.first(x), gated_product = at::empty({x.size(0), width}, x.options());
    const int64_t step = product.size(1);
    const T* from = product.data_ptr<T>();
    T* target = gated_product.data_ptr<T>();
    for (int64_t row = 0; row < x.size(0); ++row, from += step, target += width)
#ifdef HYDRA_SIMD
      simd::silu_epilogue<true>(from, from + width, target, width);
#else
      for (int64_t i = 0; i < width; ++i) target[i] = static_cast<T>(silu(from[i]) * static_cast<float>(from[i + width]));
#endif
    return (*block.down)(gated_product).add_(block.widens ? product.narrow(1, 2 * width, width) : x);
  }
};

}  // namespace native
