"""Rows of several runs read as one: each once, by a digest that knows all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.distill.stage import distilled
from pipelines.distill.union import other_rows
from pipelines.rows.feature_store import FeatureStore
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, stage_folder
from pipelines.train.loop import training_rows
from pipelines.train.stage import EXECUTION_FIELDS
from tests.pipelines.synthetic import feature_row, write_distilled, write_shard


def config_of(storage: Path, base: Path, name: str, *also: str) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": name, "base.model": str(base), "base.dtype": "fp32",
                              "train.also": list(also)})


def write_new(config: RunConfig, rows: list[dict[str, Any]]) -> None:
    folder = RunPaths.of(config).stage("distill")
    with stage_folder(config, "distill", folder, fingerprint("distill", {"new": len(rows)}, {})) as stage:
        path = folder / "features" / "part-0.parquet"
        write_shard(path, rows)
        stage.finish(StageResult("distill", None, {}, {}), [path])


def test_old_and_new_rows_together(storage: Path, tiny_base: Base, tiny_base_dir: Path) -> None:
    old, new = (config_of(storage, tiny_base_dir, name) for name in ("old", "new"))
    both = config_of(storage, tiny_base_dir, "new", "old", "new")  # itself counts once
    write_distilled(old, tiny_base, train=8, held_out=3)
    fresh = [feature_row(tiny_base, number, "train", seed=7) for number in range(4)]
    repeated = feature_row(tiny_base, 0, "train")
    write_new(new, [*fresh, repeated, feature_row(tiny_base, 1, "held_out", seed=7)])
    folder, digest = distilled(both)
    assert other_rows(both) == (RunPaths.of(old).stage("distill", "features"),)
    store = training_rows(both, folder)
    assert len(store) == 8 + 4 and len(set(store.index.ids)) == 12
    assert len(FeatureStore.open(folder, "held_out", also=other_rows(both))) == 3 + 1
    assert [row.token_ids.tolist() for row in store.read_rows(range(len(store)))]  # hidden states of both folders
    assert digest not in (distilled(new)[1], distilled(old)[1]) and distilled(new)[1] == distilled(
        config_of(storage, tiny_base_dir, "new"))[1]
    assert "also" in EXECUTION_FIELDS  # the digest of the rows stands for it


def test_a_run_without_rows_is_told(storage: Path, tiny_base: Base, tiny_base_dir: Path) -> None:
    write_distilled(config_of(storage, tiny_base_dir, "new"), tiny_base, train=4, held_out=2)
    with pytest.raises(InputError, match=r"train\.also=gone: .* has no finished `distill`: name a run of this storage"):
        distilled(config_of(storage, tiny_base_dir, "new", "gone"))
