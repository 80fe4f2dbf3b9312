"""The shipped page is what the command writes, and says what fits."""

from __future__ import annotations

import re

import pytest

from jobs import cli
from pipelines.sizing.page import COUNTS, GPUS, SHAPES, shape_of_page, sizes_of
from tests.conftest import ROOT


def test_the_page_is_what_the_command_writes(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change of a formula: `hydra-heads config --sizes > cluster/SIZES.md`."""
    assert cli.main(["config", "--sizes"]) == 0
    assert (ROOT / "cluster" / "SIZES.md").read_text(encoding="utf-8") == capsys.readouterr().out


def test_the_bases_have_the_parameters_of_their_names() -> None:
    """Those of Llama 3.2 1B, 3.1 8B and 3.1 70B, as their cards tell."""
    assert {name: round(shape_of_page(name).parameters / 1e9, 2) for name in SHAPES} == {"1B": 1.24, "8B": 8.03, "70B": 70.55}


def test_what_does_not_fit_one_gpu_runs_on_no_number_of_them() -> None:
    text = (ROOT / "cluster" / "SIZES.md").read_text(encoding="utf-8")
    times = [line for line in text.splitlines() if re.match(r"\| 70B \| (1|8|32) \|", line)]
    assert len(times) == len(COUNTS) * len(GPUS)
    assert all(line.count("does not fit") == 5 for line in times)  # distill, tree, bench, serve and batch
    assert "| 70B | serve |" in text and "| 8B | 32 |" in text and "no tensor parallelism" in text


def test_more_gpus_take_less_time_and_no_more_memory() -> None:
    for memory in GPUS:
        one, many = (sizes_of("8B", count, memory) for count in (1, 32))
        for stage in ("distill", "train hydra++", "batch"):
            first, last = one[stage].seconds, many[stage].seconds
            assert first is not None and last is not None and last.low < first.low and last.high < first.high
            assert sum(part.high for part in many[stage].device.values()) <= sum(part.high for part in one[stage].device.values())
