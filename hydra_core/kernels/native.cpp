// One step of the fused decoder, and one draft head, without Python between their operations: what PyTorch has as an
// operator is called as such, what it has not (add and normalise, turn and store, fold and unfold heads) is a loop here.
//
// Letters: B rows, N nodes a row at most, M nodes of all rows together, D width, H key/value heads, G query heads for each, d head width, S slots;
// of a draft head: W paths a row, k its tokens on a path, Vd draft vocabulary.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "draw.h"
#include "lines.h"
#include "rows.h"

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

Tensor packed_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::string_view,
                           c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  return op.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// How a matrix is laid out, as `FrozenLinear.layout`.
enum Layout : int64_t { PLAIN, ONEDNN, ROWS };

// As `FrozenLinear`: `codes` and `scales` are the 4-bit copy that up to `most` rows take, ours (int16) or torch's.
struct Linear {
  Tensor weight;
  Maybe bias, codes, scales;
  int64_t layout, most, group;

  Tensor operator()(const Tensor& x) const {  // [M, in] to [M, out]
#ifdef HYDRA_ROWS
    if (codes && x.size(0) <= most && codes->scalar_type() == at::kShort) return few::linear4(x, *codes, *scales, bias);
#endif
    if (codes && x.size(0) <= most) {
      Tensor product = at::_weight_int4pack_mm_for_cpu(x, *codes, group, *scales);
      return bias ? product.add_(*bias) : product;
    }
#ifdef HYDRA_ROWS
    if (layout == ROWS) return few::linear(x, weight, bias);
#endif
    return layout == ONEDNN ? packed_linear(x, weight, bias) : at::linear(x, weight, bias);
  }
};

struct Layer {
  Tensor input_norm, mlp_norm;
  Maybe query_norm, key_norm;
  Linear qkv, output, gate_up, down;
};

// normed = x / rms(x) * weight for each row of the stream [M, D], after adding `added` [M, D] to it where there is one.
template <typename T>
void add_and_norm(float* stream, const T* added, const float* weight, T* normed, int64_t rows, int64_t width, double eps) {
#ifdef HYDRA_ROWS
  if constexpr (std::is_same_v<T, at::BFloat16>) return few::norm(stream, added, weight, normed, rows, width, eps);
#endif
  for (int64_t row = 0; row < rows; ++row, stream += width, normed += width) {
    float squares = 0;
    if (added) {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) {
        stream[i] += static_cast<float>(added[i]);
        squares += stream[i] * stream[i];
      }
      added += width;
    } else {
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < width; ++i) squares += stream[i] * stream[i];
    }
    const float scale = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) normed[i] = static_cast<T>(stream[i] * scale * weight[i]);
  }
}

// One head [d] normalised (where it has a norm) and turned by the tables of its position, half against half.
template <typename T>
void turn(const T* head, const T* cos, const T* sin, const T* norm, double eps, T* target, int64_t width) {
#ifdef HYDRA_ROWS
  if constexpr (std::is_same_v<T, at::BFloat16>)
    if (!norm && width % 32 == 0) return few::turn(head, cos, sin, target, width);
#endif
  float values[512];
  float squares = 0;
  for (int64_t i = 0; i < width; ++i) {
    values[i] = static_cast<float>(head[i]);
    squares += values[i] * values[i];
  }
  if (norm) {
    const float scale = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
    // rounded where PyTorch rounds: the norm's product is a tensor of the working dtype
    for (int64_t i = 0; i < width; ++i)
      values[i] = static_cast<float>(static_cast<T>(values[i] * scale * static_cast<float>(norm[i])));
  }
  const int64_t half = width / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float low = values[i], high = values[i + half];
    target[i] = static_cast<T>(low * static_cast<float>(cos[i]) - high * static_cast<float>(sin[i]));
    target[i + half] =
        static_cast<T>(high * static_cast<float>(cos[i + half]) + low * static_cast<float>(sin[i + half]));
  }
}

// `layout`: its number, and the rows up to which the 4-bit copy is taken.
Linear linear_of(std::vector<Maybe> parts, std::tuple<int64_t, int64_t> layout, int64_t group) {
  return {*parts.at(0), parts.at(1), parts.at(2), parts.at(3), std::get<0>(layout), std::get<1>(layout), group};
}

struct Decoder : torch::CustomClassHolder {
  int64_t heads, kv_heads, width;
  double eps, head_eps;
  std::vector<Layer> layers;

  Decoder(int64_t heads, int64_t kv_heads, int64_t width, double eps, double head_eps)
      : heads(heads), kv_heads(kv_heads), width(width), eps(eps), head_eps(head_eps) {
    TORCH_CHECK(width <= 512 && width % 2 == 0, "head width ", width);
  }

  // `norms`: of the layer's input, of its MLP's, of query and key heads; each matrix: weight, bias, codes, scales.
  void add(std::vector<Maybe> norms, std::vector<std::vector<Maybe>> matrices, std::vector<std::tuple<int64_t, int64_t>> layouts,
           int64_t group) {
    const auto matrix = [&](size_t index) { return linear_of(matrices.at(index), layouts.at(index), group); };
    layers.push_back({*norms.at(0), *norms.at(1), norms.at(2), norms.at(3), matrix(0), matrix(1), matrix(2), matrix(3)});
  }

  // `stream`: [M, D] float32, changed in place; `keys`, `values`: [L, R, S, H, d]; `first`: cache row of the first; `slots`:
  // [B, N] int64; `cos`, `sin`: [B, N, 1, d]; `mask`: [B, 1, N, span] additive; `counts`: [B] int64 nodes of each row, which
  // come first in it, or nothing where all rows have N. What the last layer adds is returned apart, [M, D]: the final norm
  // adds it.
  Tensor run(Tensor stream, Tensor keys, Tensor values, int64_t first, Tensor slots, int64_t span, Tensor cos, Tensor sin,
             Maybe mask, Maybe counts) const {
    const Lines lines(slots.size(0), slots.size(1), counts);
    return keys.scalar_type() == at::kBFloat16
        ? run_as<at::BFloat16>(stream, lines, keys, values, first, slots, span, cos, sin, mask)
        : run_as<float>(stream, lines, keys, values, first, slots, span, cos, sin, mask);
  }

  template <typename T>
  Tensor run_as(const Tensor& stream, const Lines& lines, const Tensor& keys, const Tensor& values, int64_t first,
                const Tensor& slots, int64_t span, const Tensor& cos, const Tensor& sin, const Maybe& mask) const {
    const int64_t batch = slots.size(0), nodes = slots.size(1), depth = stream.size(-1), groups = heads / kv_heads;
    TORCH_CHECK(stream.numel() == lines.total * depth, stream.numel() / depth, " lines of ", lines.total);
    // torch's attention takes as many queries of every row: there each row has room for all N, the last of it unused
    const Lines places = own_attention<T>() ? lines : Lines(batch, nodes, {});
    Tensor normed = at::empty({lines.total, depth}, keys.options());
    Tensor queries = at::empty({places.total, heads, width}, keys.options());
    if (!own_attention<T>()) queries = queries.zero_().view({batch, kv_heads, groups * nodes, width});
    const Maybe folded_mask = mask && groups > 1 && !own_attention<T>() ? Maybe(mask->repeat({1, 1, groups, 1})) : mask;
    Tensor added;
    for (size_t index = 0; index < layers.size(); ++index) {
      const Layer& layer = layers[index];
      norm<T>(stream, added, layer.input_norm, normed, lines.total, depth);
      Tensor stored_keys = keys[index].narrow(0, first, batch), stored_values = values[index].narrow(0, first, batch);
      store<T>(layer, layer.qkv(normed), lines, places, cos, sin, slots, queries, stored_keys, stored_values);
      added = layer.output(attend<T>(queries, lines, stored_keys, stored_values, span, slots, folded_mask));
      norm<T>(stream, added, layer.mlp_norm, normed, lines.total, depth);
      added = layer.down(gate<T>(layer.gate_up(normed)));
    }
    return added;
  }

  template <typename T>
  bool own_attention() const {
#ifdef HYDRA_ROWS
    return std::is_same_v<T, at::BFloat16> && width % 32 == 0;
#else
    return false;
#endif
  }

  // [M, Hq * d], what the queries find.
  template <typename T>
  Tensor attend(const Tensor& queries, const Lines& lines, const Tensor& keys, const Tensor& values, int64_t span,
                const Tensor& slots, const Maybe& mask) const {
#ifdef HYDRA_ROWS
    if (own_attention<T>()) return few::attend(queries, lines, keys, values, span, slots, mask);
#endif
    Tensor seen = at::scaled_dot_product_attention(
        queries, keys.narrow(1, 0, span).transpose(1, 2), values.narrow(1, 0, span).transpose(1, 2), mask, 0.0, false,
        1.0 / std::sqrt(static_cast<double>(width)));
    Tensor mixed = at::empty({lines.total, heads * width}, keys.options());
    unfold<T>(seen, mixed, lines, slots.size(1));
    return mixed;
  }

  // In float32, rounded once: what goes on to the last matrix decides most of a step's rounding.
  template <typename T>
  static Tensor gate(const Tensor& made) {
#ifdef HYDRA_ROWS
    if (std::is_same_v<T, at::BFloat16>) return few::gate(made);
#endif
    std::vector<Tensor> halves = made.chunk(2, -1);
    return at::silu(halves[0].to(at::kFloat)).mul_(halves[1]).to(made.scalar_type());
  }

  template <typename T>
  void norm(const Tensor& stream, const Tensor& added, const Tensor& weight, Tensor& normed, int64_t rows, int64_t depth) const {
    add_and_norm<T>(stream.data_ptr<float>(), added.defined() ? added.contiguous().data_ptr<T>() : nullptr,
                    weight.data_ptr<float>(), normed.data_ptr<T>(), rows, depth, eps);
  }

  template <typename T>
  void store(const Layer& layer, const Tensor& qkv, const Lines& lines, const Lines& places, const Tensor& cos,
             const Tensor& sin, const Tensor& slots, Tensor& queries, Tensor& keys, Tensor& values) const {
    const int64_t nodes = slots.size(1), all = heads + 2 * kv_heads;
    const T *all_made = qkv.data_ptr<T>(), *all_cosines = cos.data_ptr<T>(), *all_sines = sin.data_ptr<T>();
    const int64_t* all_slots = slots.data_ptr<int64_t>();
    const T* query_norm = layer.query_norm ? layer.query_norm->data_ptr<T>() : nullptr;
    const T* key_norm = layer.key_norm ? layer.key_norm->data_ptr<T>() : nullptr;
    T *folded = queries.data_ptr<T>(), *key_store = keys.data_ptr<T>(), *value_store = values.data_ptr<T>();
    at::parallel_for(0, lines.total, std::max<int64_t>(1, (1 << 14) / (all * width)), [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line) {
        const int64_t row = lines.row[line], node = line - lines.first[row], index = row * nodes + node;
        const T *source = all_made + line * all * width, *cosine = all_cosines + index * width, *sine = all_sines + index * width;
        for (int64_t head = 0; head < heads; ++head) {  // those that share a key head lie together
          const int64_t place = places.first[row] * heads + head * places.count[row] + node;
          turn<T>(source + head * width, cosine, sine, query_norm, head_eps, folded + place * width, width);
        }
        const int64_t at = row * keys.stride(0) + all_slots[index] * keys.stride(1);
        for (int64_t head = 0; head < kv_heads; ++head) {
          turn<T>(source + (heads + head) * width, cosine, sine, key_norm, head_eps, key_store + at + head * width, width);
        }
        std::copy_n(source + (heads + kv_heads) * width, kv_heads * width, value_store + at);
      }
    });
  }

  // [B, H, G * N, d] of any strides to [M, H * G * d].
  template <typename T>
  void unfold(const Tensor& seen, Tensor& mixed, const Lines& lines, int64_t nodes) const {
    const int64_t groups = heads / kv_heads;
    TORCH_CHECK(seen.stride(3) == 1, "attention's output is not laid out by heads");
    const T* source = seen.data_ptr<T>();
    T* target = mixed.data_ptr<T>();
    for (int64_t line = 0; line < lines.total; ++line) {
      const int64_t row = lines.row[line], node = line - lines.first[row];
      for (int64_t head = 0; head < heads; ++head, target += width)
        std::copy_n(source + row * seen.stride(0) + head / groups * seen.stride(1) + (head % groups * nodes + node) * seen.stride(2),
                    width, target);
    }
  }
};

// A block of a draft head. `first` makes parts of D side by side: the residual kind's one, the gated kind's gate and up,
// and then, where the input is wider than the output, what it is carried on as.
struct Block {
  Linear first;
  std::optional<Linear> down;
  bool widens;
};

template <typename T>
float silu(T x) {
  const float value = static_cast<float>(x);
  return value / (1.0f + std::exp(-value));
}

// A draft head in bfloat16: its blocks, its norm, and the base's vocabulary rows.
struct Head : torch::CustomClassHolder {
  std::vector<Block> blocks;
  Maybe norm;
  double eps;
  std::optional<Linear> rows;
  double scale, softcap;

  // `norm`: [D] float32 that ends the head; `softcap`: 0 for none.
  Head(Maybe norm, double eps, double scale, double softcap) : norm(norm), eps(eps), scale(scale), softcap(softcap) {}

  // Of one or two matrices: weight, bias, codes, scales each.
  void add(std::vector<std::vector<Maybe>> matrices, std::vector<std::tuple<int64_t, int64_t>> layouts, bool widens,
           int64_t group) {
    blocks.push_back({linear_of(matrices.at(0), layouts.at(0), group), std::nullopt, widens});
    if (matrices.size() > 1) blocks.back().down = linear_of(matrices.at(1), layouts.at(1), group);
  }

  void end(std::vector<Maybe> matrix, std::tuple<int64_t, int64_t> layout, int64_t group) {
    rows = linear_of(matrix, layout, group);
  }

  // `features`: [B, D]; `path`: [B, W, k, D], or [B, W, 0, D] where the head does not hear it. Logits [B, W, Vd] float32.
  Tensor logits(Tensor features, Tensor path) const {
    Tensor made = products(features, path).to(at::kFloat);
    if (scale != 1.0) made.mul_(scale);
    if (softcap != 0.0) made.div_(softcap).tanh_().mul_(softcap);
    return made.view({path.size(0), path.size(1), -1});
  }

  // Those as the matrix makes them: [B * W, Vd].
  Tensor products(const Tensor& features, const Tensor& path) const {
    using T = at::BFloat16;
    const int64_t batch = path.size(0), paths = path.size(1), width = features.size(1);
    Tensor x = at::cat({features.unsqueeze(1).expand({batch, paths, width}), path.flatten(2)}, 2).flatten(0, 1);
    for (const Block& block : blocks) x = block.down ? gated<T>(block, x, width) : residual<T>(block, x, width);
    if (norm) {
      Tensor stream = x.to(at::kFloat);
      add_and_norm<T>(stream.data_ptr<float>(), nullptr, norm->data_ptr<float>(), x.data_ptr<T>(), x.size(0), width, eps);
    }
    return (*rows)(x);
  }

  // The `count` best of each path, best first: indices [B, W, count] int64 and their probabilities float32.
  std::tuple<Tensor, Tensor> top_k(Tensor features, Tensor path, int64_t count) const {
#ifdef HYDRA_ROWS
    if (scale == 1.0 && softcap == 0.0) return top_k_of(products(features, path), path, count);
#endif
    Tensor scores = logits(features, path);
    const int64_t size = scores.size(2), lines = scores.size(0) * scores.size(1);
    count = std::min(count, size);
    Tensor indices = at::empty({scores.size(0), scores.size(1), count}, scores.options().dtype(at::kLong));
    Tensor best = at::empty({scores.size(0), scores.size(1), count}, scores.options());
    const float* from = scores.data_ptr<float>();
    int64_t* index = indices.data_ptr<int64_t>();
    float* value = best.data_ptr<float>();
    for (int64_t line = 0; line < lines; ++line, from += size, index += count, value += count) top(from, size, count, index, value);
    return {indices, best.sub_(scores.logsumexp(-1, true)).exp_()};
  }

#ifdef HYDRA_ROWS
  static std::tuple<Tensor, Tensor> top_k_of(const Tensor& made, const Tensor& path, int64_t count) {
    const int64_t lines = made.size(0), size = made.size(1);
    count = std::min(count, size);
    Tensor indices = at::empty({path.size(0), path.size(1), count}, made.options().dtype(at::kLong));
    Tensor chances = at::empty({path.size(0), path.size(1), count}, made.options().dtype(at::kFloat));
    const at::BFloat16* from = made.const_data_ptr<at::BFloat16>();
    int64_t* index = indices.data_ptr<int64_t>();
    float* chance = chances.data_ptr<float>();
    at::parallel_for(0, lines, 1, [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line)
        few::top_k(from + line * size, size, count, index + line * count, chance + line * count);
    });
    return {indices, chances};
  }
#endif

  // Kept in order as they are found: beyond the first few, hardly a value is large enough to be looked at twice.
  static void top(const float* from, int64_t size, int64_t count, int64_t* index, float* value) {
    std::fill_n(value, count, -std::numeric_limits<float>::infinity());
    std::fill_n(index, count, 0);
    for (int64_t i = 0; i < size; ++i) {
      if (!(from[i] > value[count - 1])) continue;
      int64_t place = count - 1;
      for (; place > 0 && from[i] > value[place - 1]; --place) {
        value[place] = value[place - 1];
        index[place] = index[place - 1];
      }
      value[place] = from[i];
      index[place] = i;
    }
  }

  template <typename T>
  static Tensor residual(const Block& block, const Tensor& x, int64_t width) {
    Tensor made = block.first(x), result = at::empty({x.size(0), width}, x.options());
    const int64_t step = made.size(1);
    const T *from = made.data_ptr<T>(), *carried = block.widens ? from + width : x.data_ptr<T>();
    const int64_t carried_step = block.widens ? step : width;
    T* target = result.data_ptr<T>();
    for (int64_t row = 0; row < x.size(0); ++row, from += step, carried += carried_step, target += width)
#ifdef HYDRA_ROWS
      few::epilogue<false>(from, carried, target, width);
#else
      for (int64_t i = 0; i < width; ++i) target[i] = static_cast<T>(static_cast<float>(carried[i]) + silu(from[i]));
#endif
    return result;
  }

  template <typename T>
  static Tensor gated(const Block& block, const Tensor& x, int64_t width) {
    Tensor made = block.first(x), mixed = at::empty({x.size(0), width}, x.options());
    const int64_t step = made.size(1);
    const T* from = made.data_ptr<T>();
    T* target = mixed.data_ptr<T>();
    for (int64_t row = 0; row < x.size(0); ++row, from += step, target += width)
#ifdef HYDRA_ROWS
      few::epilogue<true>(from, from + width, target, width);
#else
      for (int64_t i = 0; i < width; ++i) target[i] = static_cast<T>(silu(from[i]) * static_cast<float>(from[i + width]));
#endif
    return (*block.down)(mixed).add_(block.widens ? made.narrow(1, 2 * width, width) : x);
  }
};

}  // namespace

bool rows_available() {
#ifdef HYDRA_ROWS
  return true;
#else
  return false;
#endif
}

bool tiles_available() {
#ifdef HYDRA_ROWS
  return few::tiles_allowed();
#else
  return false;
#endif
}

TORCH_LIBRARY(hydra_heads, library) {
  library.def("sample_tokens", draw::tokens);
  library.def("bf16_available", rows_available);
  library.def("amx_available", tiles_available);
#ifdef HYDRA_ROWS
  library.def("pack_weight", few::pack);
  library.def("linear_bf16", few::linear);
  library.def("linear_argmax", few::largest);
  library.def("linear_int4", few::linear4);
  library.def("embed_rms_norm", few::embedded);
#endif
  library.class_<Head>("DraftHead")
      .def(torch::init<Maybe, double, double, double>())
      .def("add", &Head::add)
      .def("end", &Head::end)
      .def("logits", &Head::logits)
      .def("top_k", &Head::top_k);
  library.class_<Decoder>("Decoder")
      .def(torch::init<int64_t, int64_t, int64_t, double, double>())
      .def("add", &Decoder::add)
      .def("run", &Decoder::run);
}
