"""Greedy drafting with a fixed tree as one recorded step, for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hydra_core.base.graphs import NODES, ROWS, SPANS, Recorder, Run, rounded
from hydra_core.proposers.head_features import HeadFeatures
from hydra_core.tree.draft_tree import DraftTree


class RecordedDrafts:
    """Reads the pending hidden states and fills the tree in one recorded step, without a question to the device in between.

    `fill`: writes the candidates of a tree into [B, N] tokens; `rows`: of the KV cache; `recorder`: see
    `hydra_core.base.graphs`, whose rounding applies here too. A row beyond the decoding sequences has no pending hidden
    states or belongs to no sequence: what is written past its end is never read.
    """

    def __init__(self, inputs: HeadFeatures, fill: Callable[[DraftTree, Tensor], None], rows: int, recorder: Recorder) -> None:
        self.inputs, self.fill, self.rows, self.recorder = inputs, fill, rows, recorder
        self.roots = torch.zeros(rows, dtype=torch.int64, device=inputs.features.device)
        self.recorded: dict[tuple[int, DraftTree, int, int], Run] = {}
        self._tables: list[tuple[Tensor, ...]] = []

    @torch.inference_mode()
    def __call__(self, tree: DraftTree, roots: Tensor, longest: int) -> Tensor:
        """Tokens [B, N] int64 of `tree` below `roots` [B]; the next call overwrites them.

        `longest`: committed tokens of the longest sequence.
        """
        inputs, batch = self.inputs, len(roots)
        rows = rounded(batch, ROWS, self.rows)
        width = rounded(inputs.most_pending, NODES, inputs.pending.shape[1]) if inputs.most_pending else 0
        kv_len = rounded(longest + width, SPANS, inputs.cache.slots) if inputs.cache is not None and width else 0
        self.roots[:batch] = roots
        run = self.recorded.get((rows, tree, width, kv_len))
        if run is None:
            run = self.recorded[rows, tree, width, kv_len] = self._record(rows, tree, width, kv_len)
        inputs.most_pending = 0
        return run()[:batch]

    def _record(self, rows: int, tree: DraftTree, width: int, kv_len: int) -> Run:
        def draft() -> Tensor:
            if width:
                self.inputs.read_pending(rows, width, kv_len)
            tokens = self.roots.new_full((rows, tree.size), -1)
            tokens[:, 0] = self.roots[:rows]
            self.fill(tree, tokens)
            return tokens

        run = self.recorder(draft)
        if self.inputs.prefix is not None:
            # a longer cache replaces the tables, and this recording continues to read these
            self._tables.append(self.inputs.prefix.tables)
        return run
