// All layers of a Llama-type decoder for one step, without Python between their operations. Matrix products and, where
// `attention.h` cannot run, attention are PyTorch's own operators; the operations between them are loops of this library.
//
// Letters: B sequences, N nodes per sequence at most, M nodes of all sequences, D width, L layers, R cache rows, S slots,
// Hq query heads, H key/value heads, G = Hq / H, d head width.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "activation.h"
#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "ragged.h"
#include "rope.h"

namespace native {

struct Layer {
  Tensor input_norm, mlp_norm;
  Maybe query_norm, key_norm;
  Linear qkv, output, gate_up, down;
};

struct Decoder : torch::CustomClassHolder {
  int64_t heads, kv_heads, width;
  double eps, head_eps;
  std::vector<Layer> layers;

  Decoder(int64_t heads, int64_t kv_heads, int64_t width, double eps, double head_eps)
      : heads(heads), kv_heads(kv_heads), width(width), eps(eps), head_eps(head_eps) {
    TORCH_CHECK(width <= MAX_HEAD_WIDTH && width % 2 == 0, "head width ", width);
  }

  // Append a layer. `norms`: of the layer's input, of its MLP's input, of query and key heads; `matrices`: weight, bias, codes
  // and scales of qkv, output, gate_up and down.
  void add(std::vector<Maybe> norms, std::vector<std::vector<Maybe>> matrices,
           std::vector<std::tuple<int64_t, int64_t>> layouts, int64_t group) {
    const auto matrix = [&](size_t index) { return linear_of(matrices.at(index), layouts.at(index), group); };
    layers.push_back({*norms.at(0), *norms.at(1), norms.at(2), norms.at(3), matrix(0), matrix(1), matrix(2), matrix(3)});
  }

  // `residual`: [M, D] float32, changed in place; `keys`, `values`: [L, R, S, H, d]; `first`: cache row of the first sequence;
  // `slots`: [B, N] int64; `cos`, `sin`: [B, N, 1, d]; `mask`: [B, 1, N, kv_len] additive; `counts`: [B] int64, how many nodes of
  // each sequence, the first ones, are real, or nothing where all N are. Returns the last layer's output [M, D], which is not
  // yet added to the residual: the final norm adds it.
  Tensor run(Tensor residual, Tensor keys, Tensor values, int64_t first, Tensor slots, int64_t kv_len, Tensor cos, Tensor sin,
             Maybe mask, Maybe counts) const {
    return run_tapped(residual, keys, values, first, slots, kv_len, cos, sin, mask, counts, {}, {});
  }

  // `run` that copies what enters the layers `taps` to `tapped` [taps, M, D] float32.
  Tensor run_tapped(Tensor residual, Tensor keys, Tensor values, int64_t first, Tensor slots, int64_t kv_len, Tensor cos,
                    Tensor sin, Maybe mask, Maybe counts, std::vector<int64_t> taps, Maybe tapped) const {
    const RaggedBatch lines(slots.size(0), slots.size(1), counts);
    return keys.scalar_type() == at::kBFloat16
        ? run_typed<at::BFloat16>(residual, lines, keys, values, first, slots, kv_len, cos, sin, mask, taps, tapped)
        : run_typed<float>(residual, lines, keys, values, first, slots, kv_len, cos, sin, mask, taps, tapped);
  }

  template <typename T>
  Tensor run_typed(const Tensor& residual, const RaggedBatch& lines, const Tensor& keys, const Tensor& values, int64_t first,
                   const Tensor& slots, int64_t kv_len, const Tensor& cos, const Tensor& sin, const Maybe& mask,
                   const std::vector<int64_t>& taps, const Maybe& tapped) const {
    const int64_t batch = slots.size(0), nodes = slots.size(1), hidden_width = residual.size(-1), groups = heads / kv_heads;
    TORCH_CHECK(residual.numel() == lines.total * hidden_width, residual.numel() / hidden_width, " lines of ", lines.total);
    // PyTorch's attention takes equally many queries of every sequence: there each has room for N, the last ones unused
    const RaggedBatch places = uses_own_attention<T>() ? lines : RaggedBatch(batch, nodes, {});
    Tensor normed = at::empty({lines.total, hidden_width}, keys.options());
    Tensor queries = at::empty({places.total, heads, width}, keys.options());
    if (!uses_own_attention<T>()) queries = queries.zero_().view({batch, kv_heads, groups * nodes, width});
    const Maybe folded_mask = mask && groups > 1 && !uses_own_attention<T>() ? Maybe(mask->repeat({1, 1, groups, 1})) : mask;
    Tensor added;
    for (size_t index = 0; index < layers.size(); ++index) {
      const Layer& layer = layers[index];
      norm<T>(residual, added, layer.input_norm, normed, lines.total, hidden_width);
      for (size_t tap = 0; tap < taps.size(); ++tap)  // the norm has added the layer before to the residual
        if (taps[tap] == static_cast<int64_t>(index)) tapped->select(0, tap).copy_(residual);
      Tensor stored_keys = keys[index].narrow(0, first, batch), stored_values = values[index].narrow(0, first, batch);
      rope_and_cache<T>(layer, layer.qkv(normed), lines, places, cos, sin, slots, queries, stored_keys, stored_values);
      added = layer.output(attend<T>(queries, lines, stored_keys, stored_values, kv_len, slots, folded_mask));
      norm<T>(residual, added, layer.mlp_norm, normed, lines.total, hidden_width);
      added = layer.down(silu_and_mul<T>(layer.gate_up(normed)));
    }
    return added;
  }

  // Whether attention runs by `attention.h` rather than by PyTorch.
  template <typename T>
  bool uses_own_attention() const {
#ifdef HYDRA_SIMD
    return std::is_same_v<T, at::BFloat16> && width % 32 == 0;
#else
    return false;
#endif
  }

  // Attention of the queries: [M, Hq * d].
  template <typename T>
  Tensor attend(const Tensor& queries, const RaggedBatch& lines, const Tensor& keys, const Tensor& values, int64_t kv_len,
                const Tensor& slots, const Maybe& mask) const {
#ifdef HYDRA_SIMD
    if (uses_own_attention<T>()) return simd::attention(queries, lines, keys, values, kv_len, slots, mask);
#endif
    Tensor seen = at::scaled_dot_product_attention(
        queries, keys.narrow(1, 0, kv_len).transpose(1, 2), values.narrow(1, 0, kv_len).transpose(1, 2), mask, 0.0, false,
        1.0 / std::sqrt(static_cast<double>(width)));
    Tensor mixed = at::empty({lines.total, heads * width}, keys.options());
    unfold_heads<T>(seen, mixed, lines, slots.size(1));
    return mixed;
  }

  // RMSNorm of the residual [M, D] into `normed`, after the addition of `added` [M, D] where it is defined.
  template <typename T>
  void norm(const Tensor& residual, const Tensor& added, const Tensor& weight, Tensor& normed, int64_t rows,
            int64_t hidden_width) const {
    fused_add_rms_norm<T>(residual.data_ptr<float>(), added.defined() ? added.contiguous().data_ptr<T>() : nullptr,
                          weight.data_ptr<float>(), normed.data_ptr<T>(), rows, hidden_width, eps);
  }

  // Rotate queries into `queries`, and write rotated keys and plain values to their slots of the cache.
  template <typename T>
  void rope_and_cache(const Layer& layer, const Tensor& qkv, const RaggedBatch& lines, const RaggedBatch& places,
                      const Tensor& cos, const Tensor& sin, const Tensor& slots, Tensor& queries, Tensor& keys,
                      Tensor& values) const {
    const int64_t nodes = slots.size(1), all = heads + 2 * kv_heads;
    const T *all_qkv = qkv.data_ptr<T>(), *all_cosines = cos.data_ptr<T>(), *all_sines = sin.data_ptr<T>();
    const int64_t* all_slots = slots.data_ptr<int64_t>();
    const T* query_norm = layer.query_norm ? layer.query_norm->data_ptr<T>() : nullptr;
    const T* key_norm = layer.key_norm ? layer.key_norm->data_ptr<T>() : nullptr;
    T *folded = queries.data_ptr<T>(), *key_store = keys.data_ptr<T>(), *value_store = values.data_ptr<T>();
    at::parallel_for(0, lines.total, std::max<int64_t>(1, (1 << 14) / (all * width)), [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const int64_t row = lines.row[line], node = line - lines.first[row], index = row * nodes + node;
        const T *source = all_qkv + line * all * width, *cosine = all_cosines + index * width, *sine = all_sines + index * width;
        for (int64_t head = 0; head < heads; ++head) {  // query heads that share a key head are adjacent
          const int64_t place = places.first[row] * heads + head * places.count[row] + node;
          rope<T>(source + head * width, cosine, sine, query_norm, head_eps, folded + place * width, width);
        }
        const int64_t at = row * keys.stride(0) + all_slots[index] * keys.stride(1);
        for (int64_t head = 0; head < kv_heads; ++head) {
          rope<T>(source + (heads + head) * width, cosine, sine, key_norm, head_eps, key_store + at + head * width, width);
        }
        std::copy_n(source + (heads + kv_heads) * width, kv_heads * width, value_store + at);
      }
    });
  }

  // Copy [B, H, G * N, d] of any strides to [M, H * G * d].
  template <typename T>
  void unfold_heads(const Tensor& seen, Tensor& mixed, const RaggedBatch& lines, int64_t nodes) const {
    const int64_t groups = heads / kv_heads;
    TORCH_CHECK(seen.stride(3) == 1, "attention's output is not laid out by heads");
    const T* source = seen.data_ptr<T>();
    T* target = mixed.data_ptr<T>();
    for (int64_t line = 0; line < lines.total; ++line) {
      const int64_t row = lines.row[line], node = line - lines.first[row];
      for (int64_t head = 0; head < heads; ++head, target += width) {
        const int64_t query = head % groups * nodes + node;
        std::copy_n(source + row * seen.stride(0) + head / groups * seen.stride(1) + query * seen.stride(2), width, target);
      }
    }
  }
};

}  // namespace native
