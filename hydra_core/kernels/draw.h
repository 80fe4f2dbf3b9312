// The draw of `hydra_core/sampling/noise.py` and `choose.py` for rows of scores: argmax(scores + Gumbel noise), hashing only
// tokens that can still win.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace draw {

using at::Tensor;

constexpr float HIGHEST = 16.64f;   // as in noise.py: no noise is greater
constexpr int64_t TOKENS = 64;      // looked at together: their largest score says whether one of them can win

inline uint32_t mix(uint32_t x) {  // lowbias32
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline float gumbel(uint32_t token, uint32_t first, uint32_t second) {
  const uint32_t mixed = mix(mix((token * 2654435761u) ^ first) ^ second);
  const float uniform = (static_cast<float>(mixed >> 9) + 0.5f) * 0x1p-23f;
  return -std::log(-std::log(uniform));
}

struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int64_t token = 0;

  void offer(float value, int64_t at) {  // the first of equals
    if (value > score || (value == score && at < token)) score = value, token = at;
  }
};

inline float largest(const float* scores, int64_t count) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = std::max(most, scores[i]);
  return most;
}

// `words`: the two of the row's key, or none for the largest score itself.
inline int64_t pick(const float* scores, int64_t size, const int32_t* words, std::vector<float>& most) {
  const int64_t blocks = (size + TOKENS - 1) / TOKENS;
  most.resize(blocks);
  for (int64_t block = 0; block < blocks; ++block)
    most[block] = largest(scores + block * TOKENS, std::min(TOKENS, size - block * TOKENS));
  const int64_t likely = std::max_element(most.begin(), most.end()) - most.begin();
  Best best;
  const auto look = [&](int64_t block) {
    for (int64_t token = block * TOKENS; token < std::min(size, (block + 1) * TOKENS); ++token) {
      if (!words) best.offer(scores[token], token);
      else if (scores[token] + HIGHEST >= best.score)
        best.offer(scores[token] + gumbel(token, words[0], words[1]), token);
    }
  };
  look(likely);  // its winner is hard to beat: few others have to be hashed
  if (!words) return best.token;
  for (int64_t block = 0; block < blocks; ++block)
    if (block != likely && most[block] + HIGHEST >= best.score) look(block);
  return best.token;
}

// `scores`: [R, V] float32; `keys`: [R, 2] int32; `drawing`: [R] bool, rows that draw: others take their largest score.
// Returns the tokens [R] int64.
inline Tensor tokens(const Tensor& scores, const Tensor& keys, const Tensor& drawing) {
  TORCH_CHECK(scores.dim() == 2 && scores.scalar_type() == at::kFloat && keys.is_contiguous(), "scores or keys");
  const Tensor lines = scores.stride(1) == 1 ? scores : scores.contiguous();
  const int64_t rows = lines.size(0);
  Tensor result = at::empty({rows}, keys.options().dtype(at::kLong));
  const float* from = lines.const_data_ptr<float>();
  const int32_t* words = keys.const_data_ptr<int32_t>();
  const bool* draws = drawing.const_data_ptr<bool>();
  int64_t* target = result.data_ptr<int64_t>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> most;
    for (int64_t row = begin; row < end; ++row)
      target[row] = pick(from + row * lines.stride(0), lines.size(1), draws[row] ? words + 2 * row : nullptr, most);
  });
  return result;
}

}  // namespace draw
