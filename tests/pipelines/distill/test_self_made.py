"""Prompts that the base writes itself, while processes are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.config import RunConfig, load_config
from pipelines.distill import self_made
from pipelines.distill.self_made import make_prompts
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import PROMPTS
from pipelines.runtime.artifacts import RunPaths
from tests.pipelines.distill.stand_ins import KilledPromptMaker, KilledWriter, WritingPromptMaker
from tests.pipelines.distill.test_stage import in_this_process


def settings(storage: Path, base: Path) -> tuple[RunConfig, Path]:
    config = load_config(None, {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "prompts.count": 50,
                                "distill.max_batch_size": 2, "distill.rows_per_file": 4, "distill.workers.threads": 1})
    return config, RunPaths.of(config).stage("distill")


@pytest.mark.slow
def test_kills_neither_double_nor_lose_a_prompt(local_ray: None, tiny_base_dir: Path, storage: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor dies among the prompts of a block, and the processes that write before and after a part of theirs. The prompts
    and the counts are those of an undisturbed run."""
    calm, quiet = settings(storage.parent / "calm", tiny_base_dir)
    with monkeypatch.context() as patch:
        patch.setattr(self_made, "PromptMaker", WritingPromptMaker)
        patch.setattr(self_made, "run_flow", in_this_process)
        wanted = make_prompts(calm, quiet)
    monkeypatch.setattr(self_made, "PromptMaker", KilledPromptMaker)
    monkeypatch.setattr(self_made, "PartWriter", KilledWriter)
    config, folder = settings(storage, tiny_base_dir)
    assert make_prompts(config, folder) == wanted and wanted["prompts"] == 50 and wanted["prompts_skipped"] > 0
    assert {path.name for path in (storage / "cache").glob("killed-*")} == {
        "killed-maker", "killed-before writing", "killed-after writing"}
    found, undisturbed = (sorted(read_parts(one / "prompts", PROMPTS).to_pylist(), key=lambda row: row["prompt_id"])
                          for one in (folder, quiet))
    assert found == undisturbed and len({row["prompt_id"] for row in found}) == 50
