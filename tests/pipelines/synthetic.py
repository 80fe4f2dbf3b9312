"""Distilled rows without distilling: a finished `distill` folder of a tiny base, written through the contracts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hydra_core.base import Base
from hydra_core.decoding import naive_generate
from hydra_core.sampling import Request
from pipelines.config import RunConfig
from pipelines.rows.schemas import FEATURES, content_id
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, stage_folder


def feature_row(base: Base, number: int, split: str, seed: int = 0) -> dict[str, Any]:
    """One row of the contract: a random prompt, the base's own greedy answer, and its hidden states."""
    chooser = random.Random(f"{seed}-{split}-{number}")
    prompt = [chooser.randrange(3, 40) for _ in range(chooser.randrange(3, 9))]
    request = Request("r", tuple(prompt), max_new_tokens=chooser.randrange(8, 25), stop_ids=())
    response = list(naive_generate(base, request).token_ids)
    hidden = base.hidden_states([prompt + response])[0].to(torch.bfloat16)
    return {
        "id": content_id(seed, split, number), "prompt_id": content_id(split, number), "prompt_ids": prompt,
        "response_ids": response, "finish_reason": "length", "temperature": 0.0, "seed": 0, "source": "test",
        "split": split, "base": str(base.identity),
        "hidden": hidden.contiguous().view(torch.uint8).numpy().tobytes(), "hidden_dtype": "bf16",
        "hidden_tokens": hidden.shape[0], "hidden_width": hidden.shape[1], "hidden_layer": "last"}


def write_shard(path: Path, rows: list[dict[str, Any]], row_group_size: int = 16) -> None:
    """A feature shard as `distill` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=FEATURES), path, row_group_size=row_group_size, compression="none")


def write_distilled(config: RunConfig, base: Base, train: int = 96, held_out: int = 24) -> Path:
    """Shards and manifest of a finished `distill`; returns the features folder."""
    folder = RunPaths.of(config).stage("distill")
    rows = [feature_row(base, n, "train") for n in range(train)]
    rows += [feature_row(base, n, "held_out") for n in range(held_out)]
    random.Random(0).shuffle(rows)
    half = len(rows) // 2
    with stage_folder(config, "distill", folder, fingerprint("distill", {"test": train}, {})) as stage:
        paths = [folder / "features" / "part-0.parquet", folder / "features" / "part-1.parquet"]
        write_shard(paths[0], rows[:half])
        write_shard(paths[1], rows[half:])
        stage.finish(StageResult("distill", None, {"features": str(folder / "features")}, {}), paths)
    return folder / "features"
