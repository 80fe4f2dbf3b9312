// A frozen matrix in any of its layouts: plain, oneDNN's, or the blocks of `matmul_bf16.h`; perhaps with a copy in 4 bits.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>
#include <vector>

#include "matmul_bf16.h"
#include "matmul_int4.h"

namespace native {

using at::Tensor;
using Maybe = std::optional<Tensor>;

// A product with a matrix in oneDNN's layout.
inline Tensor onednn_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  using Signature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, c10::string_view,
                           c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "").typed<Signature>();
  return op.call(x, weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// How a matrix is laid out, as `FrozenLinear.layout` in `base/linear.py`.
enum Layout : int64_t { PLAIN, ONEDNN, BLOCKED };

// As `FrozenLinear`: `codes` and `scales` are a 4-bit copy that is used for up to `most` rows, in the layout of
// `matmul_int4.h` (int16) or in PyTorch's; `group`: inputs that share a scale.
struct Linear {
  Tensor weight;
  Maybe bias, codes, scales;
  int64_t layout, most, group;

  Tensor operator()(const Tensor& x) const {  // [M, in] to [M, out]
#ifdef HYDRA_SIMD
    if (codes && x.size(0) <= most && codes->scalar_type() == at::kShort) return simd::linear_int4(x, *codes, *scales, bias);
#endif
    if (codes && x.size(0) <= most) {
      Tensor product = at::_weight_int4pack_mm_for_cpu(x, *codes, group, *scales);
      return bias ? product.add_(*bias) : product;
    }
#ifdef HYDRA_SIMD
    if (layout == BLOCKED) return simd::linear(x, weight, bias);
#endif
    return layout == ONEDNN ? onednn_linear(x, weight, bias) : at::linear(x, weight, bias);
  }
};

// `parts`: weight, bias, codes, scales; `layout`: its number, and the rows up to which the 4-bit copy is used.
inline Linear linear_of(std::vector<Maybe> parts, std::tuple<int64_t, int64_t> layout, int64_t group) {
  return {*parts.at(0), parts.at(1), parts.at(2), parts.at(3), std::get<0>(layout), std::get<1>(layout), group};
}

}  // namespace native
