// Attention of a step's queries over the KV cache: cut into tasks of one head each, which run on all threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "amx.h"
#include "attention_amx.h"
#include "attention_simd.h"
#include "ragged.h"
#include "simd.h"

#ifdef HYDRA_SIMD
namespace simd {

// `count` queries of one head of one sequence, from `first` on.
struct Task {
  int64_t row, head, first, count;
};

// `queries`: for each sequence [H, G * n, d] of its n nodes, one sequence after another; `lines`: where each sequence's nodes
// begin and how many there are; `keys`, `values`: [B, S, H, d], of which the first `kv_len` slots are read; `mask`: [B, 1, N,
// kv_len] additive; `slots`: [B, N], the slots of the nodes themselves, after all others that their sequence may see. Returns
// [M, H * G * d], the order in which the output matrix reads it.
inline Tensor attention(const Tensor& queries, const RaggedBatch& lines, const Tensor& keys, const Tensor& values,
                        int64_t kv_len, const Tensor& slots, const std::optional<Tensor>& mask) {
  const int64_t batch = slots.size(0), nodes = slots.size(1), heads = keys.size(2), width = keys.size(3);
  const int64_t groups = queries.numel() / (lines.total * heads * width), all = heads * groups * width;
  const bool tiles = uses_amx(width) && width <= 256;
  const int64_t most = tiles ? 16 : MAX_QUERIES;
  Tensor result = at::empty({lines.total, all}, queries.options());
  const Tensor masked = mask ? mask->contiguous() : Tensor();
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  Value* target = result.data_ptr<Value>();
  std::vector<int64_t> open(batch, kv_len);  // slots from the first on that all nodes of a sequence see
  std::vector<Task> tasks;
  for (int64_t row = 0; row < batch; ++row) {
#ifdef HYDRA_AMX
    for (int64_t node = 0; tiles && mask && node < lines.count[row]; ++node)
      open[row] = first_masked(masked.const_data_ptr<Value>() + (row * nodes + node) * kv_len, open[row]);
#endif
    for (int64_t head = 0; head < heads; ++head)
      in_passes(groups * lines.count[row], most, [&](int64_t first, int64_t some) { tasks.push_back({row, head, first,
                                                                                                     some}); });
  }
  const int64_t asked = std::min(most, groups * lines.total / batch + 1);  // queries of a task, on average
  const int64_t grain = std::max<int64_t>(1, MIN_WORK / (2 * asked * kv_len * width + 1));
  at::parallel_for(0, tasks.size(), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scores(tiles ? 0 : MAX_QUERIES * (kv_len + 15));
#ifdef HYDRA_AMX
    TileConfig config;
    thread_local Workspace work;
    if (tiles) config.set(MAX_ROWS_AMX);
#endif
    for (int64_t task = begin; task < end; ++task) {
      const auto [row, kv, first, count] = tasks[task];
      const int64_t own_nodes = lines.count[row], folded = groups * own_nodes;
      const int64_t own = slots.const_data_ptr<int64_t>()[row * nodes + own_nodes - 1] + 1, padded = (own + 15) / 16 * 16;
      const KeyValues head{keys.const_data_ptr<Value>() + row * keys.stride(0) + kv * keys.stride(2),
                           values.const_data_ptr<Value>() + row * values.stride(0) + kv * values.stride(2),
                           keys.stride(1), own, width};
      const Value* asked = queries.const_data_ptr<Value>() + (lines.first[row] * heads * groups + kv * folded + first) * width;
      const Value* hidden = mask ? masked.const_data_ptr<Value>() + row * nodes * kv_len : nullptr;
      Value* targets[16];
      for (int64_t query = 0; query < count; ++query) {
        const int64_t group = (first + query) / own_nodes, node = (first + query) % own_nodes;
        targets[query] = target + (lines.first[row] + node) * all + (kv * groups + group) * width;
      }
#ifdef HYDRA_AMX
      if (tiles) {
        attention_amx(head, asked, first, count, hidden, open[row], own_nodes, kv_len, scale, targets, work);
        continue;
      }
#endif
      attention_scores(head, asked, first, count, hidden, own_nodes, kv_len, scale, scores.data(), padded);
      for (int64_t query = 0; query < count; ++query) softmax(scores.data() + query * padded, padded);
      for (int64_t query = 0; query < count;) {
        const float* weights = scores.data() + query * padded;
        if (count - query >= 4) weighted_values<4>(head, weights, padded, targets + query), query += 4;
        else if (count - query >= 2) weighted_values<2>(head, weights, padded, targets + query), query += 2;
        else weighted_values<1>(head, weights, padded, targets + query), query += 1;
      }
    }
  });
  return result;
}

}  // namespace simd
#endif
