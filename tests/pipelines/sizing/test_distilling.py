"""Bytes of rows as the writer of `distill` writes them, and what its driver keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_core.base import Base
from pipelines.config import load_config
from pipelines.rows.parquet_parts import part_files, stored_ids, write_part
from pipelines.rows.schemas import FEATURES, RESPONSES
from pipelines.runtime.artifacts import StageResult, stage_folder
from pipelines.sizing.amounts import Range
from pipelines.sizing.base import shape_from
from pipelines.sizing.distilling import answer_rows_bytes, driver_bytes, feature_rows_bytes, written_bytes
from pipelines.sizing.rows import RowCounts, finished_rows, planned_rows
from tests.pipelines.synthetic import feature_row
from tests.tiny import make_config


def counts_of(rows: list[dict[str, Any]]) -> RowCounts:
    number = Range.of(len(rows))
    return RowCounts(number, number, Range.of(sum(len(row["prompt_ids"]) for row in rows)),
                     Range.of(sum(len(row["response_ids"]) for row in rows)))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in part_files(folder))


@pytest.mark.parametrize(("width", "dtype"), [(32, "bf16"), (576, "bf16"), (576, "fp32")])
def test_bytes_of_features_and_answers(tiny_base: Base, tmp_path: Path, width: int, dtype: str) -> None:
    """Inside the range, which for hidden states as wide as a small base's spans a quarter."""
    rows = [feature_row(tiny_base, number, "train") for number in range(40)]
    if width != 32:
        for row in rows:
            values = torch.randn(row["hidden_tokens"], width).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
            row |= {"hidden": values.view(torch.uint8).numpy().tobytes(), "hidden_width": width, "hidden_dtype": dtype}
    for part in (rows[:20], rows[20:]):
        write_part(tmp_path / "features", part, FEATURES)
        write_part(tmp_path / "responses", [{name: row[name] for name in RESPONSES.names} for row in part], RESPONSES)
    base = shape_from("tiny", make_config(hidden_size=width), "bf16")
    counts, config = counts_of(rows), load_config(None, {"distill.feature_dtype": dtype})
    features, answers = feature_rows_bytes(config, base, counts), answer_rows_bytes(counts)
    print(f"{width} {dtype}: {size_of(tmp_path / 'features')} of {features}, {size_of(tmp_path / 'responses')} of {answers}")
    assert features.low <= size_of(tmp_path / "features") <= features.high
    assert answers.low <= size_of(tmp_path / "responses") <= answers.high
    if width > 32:
        assert features.high < 1.7 * features.low


def test_the_driver_keeps_sixteen_bytes_of_a_row(tiny_base: Base, tmp_path: Path) -> None:
    rows = [feature_row(tiny_base, number, "train") for number in range(30)]
    write_part(tmp_path, rows, FEATURES)
    kept = stored_ids(tmp_path, FEATURES).nbytes
    found = driver_bytes(counts_of(rows))
    assert kept == 16 * 30 and found.low <= 2 * kept <= found.high  # of answers and of features
    assert driver_bytes(RowCounts(Range.of(200_000), Range.of(200_000), Range.of(1), Range.of(1))).high < 40e6


def test_a_finished_distill_is_counted_and_what_stands_is_not_needed_again(tiny_base: Base, tmp_path: Path) -> None:
    config = load_config(None, {"storage": str(tmp_path), "name": "x", "prompts.count": 10})
    assert finished_rows(config) is None and written_bytes(config, "distill") == 0
    folder = tmp_path / "runs" / "x" / "distill"
    figures = {"prompts": 5, "responses": 10, "response_tokens": 300, "feature_rows": 1, "feature_tokens": 50}
    with stage_folder(config, "distill", folder, "0" * 64) as stage:
        path = write_part(folder / "features", [feature_row(tiny_base, 0, "held_out")], FEATURES)
        stage.finish(StageResult("distill", None, {}, figures), [path])
    found = finished_rows(config)
    assert found is not None and (found.answers, found.answer_tokens, found.prompt_tokens) == (
        Range.of(10), Range.of(300), Range.of(200))
    assert written_bytes(config, "distill") == path.stat().st_size
    assert planned_rows(config).answers == Range.of(20)
