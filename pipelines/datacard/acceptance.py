"""Tokens per step of trained heads by group of held-out rows: one Ray task, teacher-forced, as the `tree` stage counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hydra_core.base import load_vocabulary
from hydra_core.heads.checkpoint import load_checkpoint
from hydra_core.storage import as_path
from hydra_core.training.ranks import rank_rows
from hydra_core.tree import DraftTree
from hydra_core.tree.search import REFERENCE_NODES, rank_paths
from hydra_core.tree.simulation import RankRows, walk
from pipelines.config import RunConfig
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import RowReader
from pipelines.runtime.artifacts import RunPaths

ROWS_PER_BATCH = 8


def held_out_ranks(values: dict[str, Any], heads: Mapping[str, str], features: str) -> tuple[list[str], dict[str, RankRows]]:
    """Ids of at most `datacard.acceptance_rows` held-out rows, and the rank tuples of these rows for each drafter of `heads`
    (name -> checkpoint folder); runs in one Ray task."""
    config = RunConfig.model_validate(values)
    torch.set_num_threads(config.tree.threads)
    reader = RowReader(FeatureStore.open(as_path(features), "held_out"))
    chosen = reader.store.sample(config.datacard.acceptance_rows, config.train.seed)
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=RunPaths.of(config).cache)
    found = {}
    for name, folder in heads.items():
        drafter = load_checkpoint(as_path(folder), vocabulary, vocabulary.embedding.dtype).drafter
        found[name] = RankRows.concatenate(rank_rows(drafter, reader.pack(chosen[start:start + ROWS_PER_BATCH]))
                                           for start in range(0, len(chosen), ROWS_PER_BATCH))
    return [reader.store.index.ids[row] for row in chosen], found


def tokens_per_step_by_group(rows: RankRows, groups: Sequence[str]) -> dict[str, float]:
    """Group -> tokens per step with one tree of `REFERENCE_NODES` nodes for all, fitted to all rows; `groups`: of each row."""
    tree = DraftTree(rank_paths(rows, REFERENCE_NODES - 1))
    parts = torch.split(rows.ranks, list(rows.positions))
    found = {}
    for name in dict.fromkeys(groups):
        own = [part for part, group in zip(parts, groups, strict=True) if group == name]
        found[name] = walk(tree, RankRows(torch.cat(own), tuple(len(part) for part in own))).tokens_per_step
    return found
