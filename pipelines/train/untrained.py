"""`train.dry_run`: untrained heads as a checkpoint, so that serving can be tried before training is paid for.

They lie under `train-dry`, beside `train`: a later training run finds its own folder untouched, and no stage takes them
for trained ones. They may be made again at any time, and draft next to nothing that the base agrees with.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from hydra_core.base import BaseVocabulary, load_vocabulary
from hydra_core.heads import DraftVocab, build_drafter
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import default_trees
from pipelines.config import RunConfig
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.online_features import OnlineStore
from pipelines.rows.parquet_parts import part_files
from pipelines.runtime.artifacts import RunPaths, StageResult, read_manifest
from pipelines.runtime.provenance import provenance
from pipelines.train.warm_start import begin_with

DRY = "train-dry"


def run_dry(config: RunConfig, names: Sequence[str]) -> StageResult:
    """Save untrained heads of every drafter of `names`. Needs no cluster and no tracker. Raises InputError for a bad base.

    Outputs: drafter -> heads folder, which `serve.model`, `bench.heads` and `load_heads` take.
    """
    paths = RunPaths.of(config)
    vocabulary = load_vocabulary(config.base.model, dtype=config.base.dtype, cache=paths.cache)
    counts, outputs = _counts(paths, vocabulary), {}
    for name in names:
        heads = config.train.drafters[name]
        torch.manual_seed(config.train.seed)
        draft_vocab = DraftVocab.rank(counts, heads.draft_vocab_size, vocabulary.stop_ids)
        folder = paths.stage(DRY, name) / "heads"
        drafter = build_drafter(heads, vocabulary, draft_vocab)
        begin_with(drafter, config, name, vocabulary)
        save_checkpoint(folder, drafter, vocabulary.identity,
                        default_trees(heads.num_heads), provenance(config) | {"training": {"step": 0, "dry_run": True}})
        outputs[name] = str(folder)
        print(f"train: untrained {name} heads, to try with serve.model={folder}", file=sys.stderr)
    return StageResult("train", None, outputs, {"dry_run": True})


def _counts(paths: RunPaths, vocabulary: BaseVocabulary) -> torch.Tensor:
    """How often tokens were answered, [V] int64; before `distill` lower ids count as more frequent, as tokenizers order."""
    folder = paths.stage("distill")
    if read_manifest(folder) is None:
        return torch.arange(vocabulary.size, 0, -1)
    kept = folder / "responses"
    rows = OnlineStore.open(kept, "train") if part_files(kept) else FeatureStore.open(folder / "features", "train")
    return rows.response_counts(vocabulary.size)
