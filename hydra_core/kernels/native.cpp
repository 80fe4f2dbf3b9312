// The operators and classes that Python calls, all through `ops.py`. This file is compiled; it includes all the others.

#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>

#include "amx.h"
#include "decoder.h"
#include "draft_head.h"
#include "matmul_bf16.h"
#include "matmul_int4.h"
#include "norm.h"
#include "sampling.h"
#include "simd.h"

namespace {

// The instructions that the bfloat16 operators are made of; without any there are none of these operators.
std::string instructions() {
#ifdef HYDRA_AVX512
  return "avx512";
#elif defined(HYDRA_AVX2)
  return "avx2";
#else
  return "";
#endif
}

// Whether they use AMX tiles.
bool amx_available() {
#ifdef HYDRA_SIMD
  return simd::amx_allowed();
#else
  return false;
#endif
}

}  // namespace

TORCH_LIBRARY(hydra_heads, library) {
  library.def("sample_tokens", sampling::sample_tokens);
  library.def("instructions", instructions);
  library.def("amx_available", amx_available);
#ifdef HYDRA_SIMD
  library.def("pack_weight", simd::pack_weight);
  library.def("linear_bf16", simd::linear);
  library.def("linear_argmax", simd::linear_argmax);
  library.def("linear_int4", simd::linear_int4);
  library.def("embed_rms_norm", simd::embed_rms_norm);
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
      .def("run", &native::Decoder::run)
      .def("run_tapped", &native::Decoder::run_tapped);
}
