// Rows of several nodes as the lines of one matrix, none of them padded.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <vector>

// Row b has `count[b]` nodes, which are lines `first[b]` and on; `row[line]` is the row that a line belongs to.
struct Lines {
  std::vector<int64_t> first, count, row;
  int64_t total = 0;

  // `counts`: [B] int64 nodes of each row, at most `nodes`; nothing where all rows have so many.
  Lines(int64_t batch, int64_t nodes, const std::optional<at::Tensor>& counts) : count(batch, nodes) {
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
