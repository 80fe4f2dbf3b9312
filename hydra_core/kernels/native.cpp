// The operators and classes that Python calls, all through `ops.py`. This file is compiled; it includes all the others.

#include <torch/custom_class.h>
#include <torch/library.h>

#include "amx.h"
#include "decoder.h"
#include "draft_head.h"
#include "matmul_bf16.h"
#include "matmul_int4.h"
#include "norm.h"
#include "sampling.h"
#include "simd.h"

namespace {

// Whether the bfloat16 operators are in this library.
bool bf16_available() {
#ifdef HYDRA_AVX512
  return true;
#else
  return false;
#endif
}

// Whether they use AMX tiles.
bool amx_available() {
#ifdef HYDRA_AVX512
  return avx512::amx_allowed();
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY(hydra_heads, library) {
  library.def("sample_tokens", sampling::sample_tokens);
  library.def("bf16_available", bf16_available);
  library.def("amx_available", amx_available);
#ifdef HYDRA_AVX512
  library.def("pack_weight", avx512::pack_weight);
  library.def("linear_bf16", avx512::linear);
  library.def("linear_argmax", avx512::linear_argmax);
  library.def("linear_int4", avx512::linear_int4);
  library.def("embed_rms_norm", avx512::embed_rms_norm);
#endif
  library.class_<native::DraftHead>("DraftHead")
      .def(torch::init<native::Maybe, double, double, double>())
      .def("add", &native::DraftHead::add)
      .def("end", &native::DraftHead::end)
      .def("logits", &native::DraftHead::logits)
      .def("top_k", &native::DraftHead::top_k);
  library.class_<native::Decoder>("Decoder")
      .def(torch::init<int64_t, int64_t, int64_t, double, double>())
      .def("add", &native::Decoder::add)
      .def("run", &native::Decoder::run);
}
