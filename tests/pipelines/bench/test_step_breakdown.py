"""What a step costs and yields, by hand; turns pooled; the figures; peak memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.bench.memory import PeakMemory, memory_markdown, read_memory
from pipelines.bench.plan import Row
from pipelines.bench.plots import accepted_plot, category_plot, draw
from pipelines.bench.report import category_markdown, category_table, markdown, method_table, metrics_of, summarise
from pipelines.bench.step_breakdown import COLUMNS, step_figures, step_table, steps_markdown


def row(method: str = "hydra", tokens: int = 11, **more: Any) -> Row:
    return Row(**{"round": 0, "question": "a", "category": "all", "method": method, "token_ids": (0,) * tokens,
                  "steps": tokens - 1, "prefill_seconds": 0.1, "decode_seconds": 1.0, **more})


def drafting(**more: Any) -> Row:
    return row(steps=4, accepted_lengths=(1, 1, 2), draft_seconds=0.1, verify_seconds=0.6, accept_seconds=0.1,
               commit_seconds=0.1, predicted_seconds=0.8, **more)


def test_a_step_by_hand() -> None:
    found = step_figures([drafting(), drafting(prefill_seconds=0.3, decode_seconds=2.0)])
    assert (found["first_token_ms"], found["step_ms"], found["draft_ms"], found["verify_ms"]) == (200.0, 375.0, 25.0, 150.0)
    assert (found["accept_commit_ms"], found["overhead_ms"]) == (50.0, 150.0)
    assert found["measured_vs_predicted"] == pytest.approx(3.0 / 1.6)
    assert found["accepted_lengths"] == [2, 2, 4] and found["accepted_at_least"] == [0.75, 0.5]
    longer = step_figures([drafting(), row(steps=4, accepted_lengths=(3, 0, 0, 1))])
    assert longer["accepted_lengths"] == [4, 1, 2, 1] and longer["accepted_at_least"] == [0.5, 0.375, 0.125]


def test_unknown_values_are_not_shown() -> None:
    foreign = step_figures([row("transformers")])  # no phases, no drafts, no forecast
    assert foreign["step_ms"] == 100.0 and foreign["first_token_ms"] == 100.0
    assert foreign["draft_ms"] is foreign["overhead_ms"] is foreign["measured_vs_predicted"] is None
    assert foreign["accepted_lengths"] == foreign["accepted_at_least"] == []
    assert step_figures([row(tokens=1, steps=0)])["step_ms"] is None
    assert not any(step_figures([]).values())


def test_turns_and_rounds_of_a_question_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"plain": (1.1, 3.1), "hydra": (0.6, 1.6)}  # of the first and the second turn
    rows = [row(method, token_ids=(turn,) * 11, turn=turn, round=number, decode_seconds=taken - 0.1)
            for number in (0, 1) for method, both in seconds.items() for turn, taken in enumerate(both)]
    found = summarise(rows, [])
    assert found["hydra"]["speed_vs_plain"] == pytest.approx((1.1 + 3.1) / (0.6 + 1.6), abs=1e-3)
    assert found["hydra"]["identical"] == 1.0 and found["hydra"]["rows"] == 4  # a turn is compared with the same turn
    other = summarise([*rows, row("hydra", token_ids=(7,) * 11, turn=2), row("plain", token_ids=(8,) * 11, turn=2)], [])
    assert other["hydra"]["identical"] == 0.8
    figures = summarise([row("plain"), drafting()], [])
    assert figures["hydra"]["accepted_at_least"][0] == 0.75 and figures["hydra"]["draft_ms"] == 25.0
    assert set(metrics_of(figures)) == {f"{name}.{key}" for name in figures for key in ("tokens_per_step", "speed_vs_plain")}
    cells = dict(zip(COLUMNS, next(cells for cells in step_table(figures).rows if cells[0] == "hydra"), strict=True))
    assert [cells[name] for name in ("step", COLUMNS[6], "1+ drafts", "3+ drafts")] == ["250.0", "1.25", "75 %", "-"]
    figures["plain"]["measured_vs_predicted"] = 1.0
    figures["hydra"]["measured_vs_predicted"] = 1.1
    assert next(cells for cells in step_table(figures).rows if cells[0] == "hydra")[6] == "1.10 (1.10)"
    step_table(figures).show()
    assert "75 %" in capsys.readouterr().err and "| hydra | 250.0 | 25.0 |" in steps_markdown(figures)
    assert steps_markdown(summarise([], [])) == ""
    assert markdown({}, "loads alone", "bf16") == "# loads alone\n"  # bench.single=false: no table without a row
    assert not method_table({}, "loads alone", "bf16").rows
    method_table(figures, "all", "bf16").show()
    assert "hydra" in capsys.readouterr().err and "| hydra |" in markdown(figures, "all", "bf16")


def test_categories_and_rounds_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(method, question=f"{name}{number}", category=name, round=turn, decode_seconds=seconds * (1 + number))
            for method, by in {"plain": {"chat": 1.0, "rag": 1.0}, "hydra": {"chat": 1.0, "rag": 0.25}}.items()
            for name, seconds in by.items() for number in range(2) for turn in range(2)]
    figures = summarise(rows, [])
    found = figures["hydra"]["categories"]
    assert found["rag"]["decode_speed_vs_plain"] == 4.0 and found["chat"]["speed_vs_plain"] == 1.0
    low, high = found["rag"]["spread"]
    assert 1.0 < low <= found["rag"]["speed_vs_plain"] <= high
    assert figures["hydra"]["rounds"] == [figures["hydra"]["speed_vs_plain"]] * 2
    told = category_markdown(figures)
    assert "| hydra | 1.00x (" in told and "round by round: hydra" in told
    category_table(figures).show()
    assert "By category" in capsys.readouterr().err
    assert not category_table(summarise([row("plain")], [])).rows  # one category needs no table


def test_figures(tmp_path: Path) -> None:
    rows = [row("plain", accepted_lengths=(10,)), row("plain", question="b", category="rag", accepted_lengths=(10,)),
            drafting(), drafting(question="b", category="rag", decode_seconds=0.5)]
    figures = summarise(rows, [])
    drawn = draw(figures, tmp_path)
    assert [path.name for path in drawn] == ["report.png", "categories.png", "accepted.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn) and len(list(tmp_path.iterdir())) == 3
    axis = category_plot(figures).axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["all", "rag"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["hydra", "plain"]  # fastest first
    assert [bar.get_height() for bar in axis.patches[:2]] == [1.0, pytest.approx(1.1 / 0.6, abs=1e-3)]
    shares = [bar.get_height() for bar in accepted_plot(figures).axes[0].patches]  # plain drafts nothing
    assert np.allclose(shares, [0.25, 0.25, 0.5])
    alone = draw(summarise([row("plain", accepted_lengths=(10,))], []), tmp_path)  # nothing to compare, nothing old left
    assert [path.name for path in alone] == ["report.png"] and [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_the_most_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "memory.json"
    assert read_memory(path) == {} and memory_markdown({}) == ""
    memory = PeakMemory(path, torch.device("cpu"))
    with memory.of("plain"):
        held = bytearray(200 * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    size = len(held)
    del held
    memory.write()
    assert read_memory(path)["resident_peak_bytes"] > size and read_memory(path).keys() == {"resident_peak_bytes"}
    path.write_text(json.dumps({"resident_peak_bytes": 2**45}), encoding="utf-8")
    again = PeakMemory(path, torch.device("cuda"))  # gone on with: the most of both
    for peak, method in ((5, "plain"), (9, "hydra"), (7, "plain"), (6, "plain")):
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device, peak=peak: peak * 2**30)
        with again.of(method):
            pass
    again.write()
    assert read_memory(path) == {"resident_peak_bytes": 2**45, "cuda_peak_bytes": {"plain": 7 * 2**30, "hydra": 9 * 2**30}}
    assert "hydra decoded, including what the others hold: 9.00 GiB" in memory_markdown(read_memory(path))
