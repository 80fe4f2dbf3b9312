"""`train.dry_run`: a checkpoint of untrained heads, with which serving can be tried before the cost of training.

They are written to `train-dry`, beside `train`, so that no stage takes them for trained ones and a later training finds its
folder free. They may be written again at any time. The base accepts almost none of their drafts.
"""

from __future__ import annotations

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
from pipelines.runtime.console import say
from pipelines.runtime.provenance import provenance
from pipelines.train.warm_start import load_start

DRY = "train-dry"


def run_dry(config: RunConfig, names: Sequence[str]) -> StageResult:
    """Save untrained heads of every drafter of `names`, without a cluster or a tracker. Raises InputError for a bad base.

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
        load_start(drafter, config, name, vocabulary)
        save_checkpoint(folder, drafter, vocabulary.identity,
                        default_trees(heads.num_heads), provenance(config) | {"training": {"step": 0, "dry_run": True}})
        outputs[name] = str(folder)
        say("train", f"untrained {name} heads, to try with serve.model={folder}")
    return StageResult("train", None, outputs, {"dry_run": True})


def _counts(paths: RunPaths, vocabulary: BaseVocabulary) -> torch.Tensor:
    """How often each token occurs in answers, [V] int64. Before `distill`, lower ids count as more frequent, as in the
    order of tokenizers."""
    folder = paths.stage("distill")
    if read_manifest(folder) is None:
        return torch.arange(vocabulary.size, 0, -1)
    answers = folder / "responses"
    rows = OnlineStore.open(answers, "train") if part_files(answers) else FeatureStore.open(folder / "features", "train")
    return rows.response_counts(vocabulary.size)
