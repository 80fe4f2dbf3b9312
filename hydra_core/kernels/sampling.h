// The draw of `hydra_core/sampling/noise.py` and `sampler.py` for lines of scores: argmax(scores + Gumbel noise), with noise
// computed only for tokens that can still win.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace sampling {

using at::Tensor;

constexpr float MAX_NOISE = 16.64f;  // as in noise.py: no noise is greater
constexpr int64_t BLOCK = 64;        // tokens whose largest score says whether one of them can win

inline uint32_t hash(uint32_t x) {  // lowbias32
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline float gumbel(uint32_t token, uint32_t first, uint32_t second) {
  const uint32_t mixed = hash(hash((token * 2654435761u) ^ first) ^ second);
  const float uniform = (static_cast<float>(mixed >> 9) + 0.5f) * 0x1p-23f;
  return -std::log(-std::log(uniform));
}

// The largest value offered so far.
struct Best {
  float score = -std::numeric_limits<float>::infinity();
  int64_t token = 0;

  void offer(float value, int64_t at) {  // the first among equals
    if (value > score || (value == score && at < token)) score = value, token = at;
  }
};

inline float largest_of(const float* scores, int64_t count) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) most = std::max(most, scores[i]);
  return most;
}

// The token of one line. `words`: the two words of its key, or null to take the largest score without noise; `most`: a buffer.
inline int64_t sample(const float* scores, int64_t size, const int32_t* words, std::vector<float>& most) {
  const int64_t blocks = (size + BLOCK - 1) / BLOCK;
  most.resize(blocks);
  for (int64_t block = 0; block < blocks; ++block)
    most[block] = largest_of(scores + block * BLOCK, std::min(BLOCK, size - block * BLOCK));
  const int64_t best_block = std::max_element(most.begin(), most.end()) - most.begin();
  Best best;
  const auto search = [&](int64_t block) {
    for (int64_t token = block * BLOCK; token < std::min(size, (block + 1) * BLOCK); ++token) {
      if (!words) best.offer(scores[token], token);
      else if (scores[token] + MAX_NOISE >= best.score)
        best.offer(scores[token] + gumbel(token, words[0], words[1]), token);
    }
  };
  search(best_block);  // its winner is hard to beat, so noise is computed for few other tokens
  if (!words) return best.token;
  for (int64_t block = 0; block < blocks; ++block)
    if (block != best_block && most[block] + MAX_NOISE >= best.score) search(block);
  return best.token;
}

// `scores`: [M, V] float32; `keys`: [M, 2] int32; `drawing`: [M] bool, false for lines that take their largest score without
// noise. Returns the tokens [M] int64.
inline Tensor sample_tokens(const Tensor& scores, const Tensor& keys, const Tensor& drawing) {
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
      target[row] = sample(from + row * lines.stride(0), lines.size(1), draws[row] ? words + 2 * row : nullptr, most);
  });
  return result;
}

}  // namespace sampling
