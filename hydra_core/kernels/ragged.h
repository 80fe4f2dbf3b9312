// Sequences with different numbers of nodes as the lines of one matrix, without padding.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

// Sequence b has `count[b]` nodes, which are the lines from `first[b]` on; `row[line]` is the sequence of a line.
struct RaggedBatch {
  std::vector<int64_t> first, count, row;
  int64_t total = 0;

  // `counts`: [B] int64, the nodes of each sequence, at most `nodes`; nothing where every sequence has `nodes`.
  RaggedBatch(int64_t batch, int64_t nodes, const std::optional<at::Tensor>& counts) : count(batch, nodes) {
    if (counts) {
      TORCH_CHECK(counts->numel() == batch, counts->numel(), " counts of ", batch, " rows");
      const at::Tensor given = counts->contiguous();
      std::copy_n(given.const_data_ptr<int64_t>(), batch, count.begin());
    }
    for (int64_t at = 0; at < batch; total += count[at++]) {
      TORCH_CHECK(0 <= count[at] && count[at] <= nodes, count[at], " nodes of ", nodes);
      first.push_back(total);
      row.insert(row.end(), count[at], at);
    }
  }
};
