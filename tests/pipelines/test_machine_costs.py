"""Step costs: timed once, kept for this machine and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.checkpoint import save_checkpoint
from hydra_core.decoding import DecodingConfiguration, Engine, load_heads, save_configuration
from hydra_core.drafters import AdaptiveDrafter
from hydra_core.tree import PLAIN, TreeSet
from pipelines import machine_costs as module
from pipelines.machine_costs import machine_costs
from tests.trained import random_heads


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEATS", 3)
    monkeypatch.setattr(module, "NODES", (1, 2, 8))
    monkeypatch.setattr(module, "BATCHES", (1, 4))


def test_timed_once_for_a_machine(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    first = machine_costs(tiny_base, tmp_path, batches=(1, 4))
    assert set(first.verify) == {1, 4} and set(first.verify[1]) == {1, 2, 8} and first.draft_seconds(1, 0) > 0
    assert "timing verify steps" in capsys.readouterr().err
    assert machine_costs(tiny_base, tmp_path, batches=(1, 4)) == first and not capsys.readouterr().err
    heads = random_heads(tiny_base, "hydra++")
    with_heads = machine_costs(tiny_base, tmp_path, heads, batches=(1, 4))
    assert with_heads.verify == first.verify and set(with_heads.draft[4]) == {0, 1, 2, 3}
    assert with_heads.draft[1][3] > with_heads.draft[1][0] > 0
    assert "timing draft steps" in capsys.readouterr().err
    monkeypatch.setattr(module, "fingerprint_of_machine", lambda device: {"device": "another"})
    machine_costs(tiny_base, tmp_path, batches=(1, 4))
    assert "timing verify steps" in capsys.readouterr().err


def test_a_broken_file_is_timed_again(tiny_base: Base, tmp_path: Path) -> None:
    machine_costs(tiny_base, tmp_path, batches=(1,))
    (path,) = (tmp_path / "costs").glob("verify-*.json")
    path.write_text("{", encoding="utf-8")
    assert machine_costs(tiny_base, tmp_path, batches=(1,)).verify[1][8] > 0


def test_a_combined_configuration_decodes_by_them(tiny_base: Base, tmp_path: Path) -> None:
    heads = random_heads(tiny_base, "hydra++")
    save_checkpoint(tmp_path / "heads", heads, tiny_base.identity, TreeSet({1: PLAIN}), {})
    for kind in ("ngram", "combined"):
        save_configuration(tmp_path / kind, DecodingConfiguration(
            kind, kind, tiny_base.identity, heads=tmp_path / "heads" if kind == "combined" else None))
        drafter, trees = load_heads(tmp_path / kind, tiny_base, lambda found: machine_costs(tiny_base, tmp_path, found, (1,)))
        assert isinstance(drafter, AdaptiveDrafter) and trees is None and (drafter.heads is None) == (kind == "ngram")
        assert drafter.costs.verify[1][8] > 0
        assert Engine(tiny_base, drafter).answer(["abcabcabc"], max_new_tokens=12) == Engine(tiny_base).answer(
            ["abcabcabc"], max_new_tokens=12)
