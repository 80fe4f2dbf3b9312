"""Step costs: timed once, kept for this machine and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, Engine, load_heads, save_configuration
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.proposers import AdaptiveDrafter
from hydra_core.tree import PLAIN, DraftTree, TreeSet
from hydra_core.tree.costs import StepCosts
from pipelines.config import TreeSection
from pipelines.profiling import cost_cache as module
from pipelines.profiling import step_timing as step_costs
from pipelines.profiling.cost_cache import costs_of_one, groups_to_time, machine_costs, step_curves
from tests.trained import random_heads

QUICK = TreeSection(batch_sizes=(1, 4), node_counts=(1, 2, 8), context=60, far_contexts=(200,), repeats=3)


def measured_by(point: tuple[int, int, int]) -> float:
    """A machine that is linear in all it does, and slower from 8 rows on."""
    context, batch, nodes = point
    return 20.0 + batch * nodes * (0.5 + context / 1000) + (9.0 if batch * nodes > 8 else 0.0)


@pytest.fixture
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Nothing is run and no time is read: the list of what was asked to be timed."""
    asked: list[object] = []

    def verify(base: Base, points: list[tuple[int, int, int]], repeats: int, say: object) -> dict[tuple[int, int, int], float]:
        asked.append(list(points))
        return {point: measured_by(point) for point in points}

    def draft(base: Base, heads: object, trees: object, batches: list[int], context: int, repeats: int,
              say: object) -> dict[tuple[int, int], float]:
        asked.append(("draft", trees is None))
        return {(batch, depth): 1.0 + batch * depth for batch in batches for depth in range(4)}

    monkeypatch.setattr(module, "verify_seconds", verify)
    monkeypatch.setattr(module, "draft_seconds", draft)
    return asked


def test_timed_once_for_a_machine(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    first = machine_costs(tiny_base, tmp_path, None, QUICK)
    assert set(first.verify) == {1, 4} and set(first.verify[1]) == {1, 2, 8} and first.draft_seconds(1, 0) > 0
    assert first.context == 60 and set(first.far) == {200} and set(first.far[200][4]) == {1, 2, 8}
    assert "timing verify steps" in capsys.readouterr().err
    assert machine_costs(tiny_base, tmp_path, None, QUICK) == first and not capsys.readouterr().err
    heads = random_heads(tiny_base, "hydra++")
    with_heads = machine_costs(tiny_base, tmp_path, heads, QUICK)
    assert with_heads.verify == first.verify and set(with_heads.draft[4]) == {0, 1, 2, 3}
    assert with_heads.draft[1][3] > with_heads.draft[1][0] > 0
    assert "timing draft steps" in capsys.readouterr().err
    fixed = machine_costs(tiny_base, tmp_path, heads, QUICK, {1: DraftTree(((0,),)), 2: DraftTree(((0,), (0, 0)))})
    assert fixed.verify == first.verify and set(fixed.draft[1]) == {1, 2} and min(fixed.draft[4].values()) > 0
    monkeypatch.setattr(module, "fingerprint_of_machine", lambda device: {"device": "another"})
    machine_costs(tiny_base, tmp_path, None, QUICK)
    assert "timing verify steps" in capsys.readouterr().err


def test_settings_and_trees_are_part_of_what_is_kept(tiny_base: Base, tmp_path: Path, fake_clock: list[object]) -> None:
    heads = random_heads(tiny_base, "hydra++")
    machine_costs(tiny_base, tmp_path, heads, QUICK)
    machine_costs(tiny_base, tmp_path, heads, QUICK)
    assert len(fake_clock) == 2
    machine_costs(tiny_base, tmp_path, heads, QUICK, {3: DraftTree(((0,), (0, 0), (0, 0, 0)))})
    machine_costs(tiny_base, tmp_path, random_heads(tiny_base, "medusa"), QUICK)
    assert fake_clock[2:] == [("draft", False), ("draft", True)]
    for change in ({"repeats": 4}, {"context": 61}, {"node_counts": (1, 2)}, {"batch_sizes": (1,)}, {"far_contexts": ()}):
        count = len(fake_clock)
        machine_costs(tiny_base, tmp_path, heads, QUICK.model_copy(update=change))
        assert isinstance(fake_clock[count], list)  # the base's part, anew
    assert machine_costs(tiny_base, tmp_path, heads, QUICK, {}).draft_seconds(4, 1) > 0  # heads that never were right
    count = len(fake_clock)
    machine_costs(tiny_base, tmp_path, None, QUICK.model_copy(update={"curves": True, "max_rows": 3, "threads": 1}))
    assert len(fake_clock) == count  # what has nothing to do with a step's time


def test_the_table_foretells_what_it_has_not_measured(tiny_base: Base, tmp_path: Path, fake_clock: list[object]) -> None:
    """Each measured point as measured; between and beyond, what a machine that is linear there takes."""
    costs = machine_costs(tiny_base, tmp_path, None, QUICK)
    for context, batch, nodes in fake_clock[0]:  # type: ignore[attr-defined]
        assert costs.verify_seconds(batch, nodes, context) == pytest.approx(measured_by((context, batch, nodes)))
    assert costs.verify_seconds(1, 5, 130) == pytest.approx(measured_by((130, 1, 5)))
    assert costs.verify_seconds(4, 16, 400) > costs.verify_seconds(4, 16, 300) > costs.verify_seconds(4, 12, 300)
    assert StepCosts.from_json(costs.to_json()) == costs


def test_only_what_can_pay_and_fits_is_timed(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = groups_to_time(TreeSection(), 8192, 512)
    assert {context for context, _, _ in groups} == {256, 2048}
    assert {batch: nodes[-1] for context, batch, nodes in groups if context == 256} == {1: 48, 4: 48, 16: 32, 64: 8}
    assert all(len(nodes) == 3 and batch <= 64 for context, batch, nodes in groups if context == 2048)
    assert {nodes[-1] for _, batch, nodes in groups_to_time(TreeSection(), 8192, None) if batch == 64} == {48}
    assert groups_to_time(TreeSection(batch_sizes=(600,), node_counts=(1, 32)), 8192, 512)[0][2] == (1, 32)
    assert groups_to_time(TreeSection(), 48, 512)[0] == (16, 1, (1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32))
    assert groups_to_time(TreeSection(), 2, 512) == [(1, batch, (1,)) for batch in (1, 4, 16, 64)]
    small, large = (60, 1, (1, 8)), (60, 4, (1, 8))
    room = tiny_base.decoder.cache_bytes(5, 68) + step_costs.workspace_bytes(tiny_base, 4, 68, 8)
    for free, fitting in ((room, [small, large]), (room - 1, [small]), (10, [])):
        monkeypatch.setattr(step_costs, "free_bytes", lambda device, free=free: free / step_costs.SHARE_OF_MEMORY)
        found = step_costs.that_fit(tiny_base, [large, small, (300, 1, (1,))])
        assert found == [(context, batch, count) for context, batch, nodes in fitting for count in nodes]


def test_no_memory_leaves_the_smallest_batch(tiny_base: Base, tmp_path: Path, fake_clock: list[object],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.profiling.step_timing.free_bytes", lambda device: 0)
    assert machine_costs(tiny_base, tmp_path, None, QUICK).verify.keys() == {1}


def test_curves_go_to_the_end_of_the_context(tiny_base: Base, tmp_path: Path, fake_clock: list[object],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    points = step_curves(tiny_base, tmp_path)
    assert set(points) == {(224, batch, nodes) for batch in (1, 4, 16) for nodes in (1, 8, 16, 32)}
    assert step_curves(tiny_base, tmp_path) == points and len(fake_clock) == 1
    monkeypatch.setattr(tiny_base, "context_limit", 3000)
    assert {context for context, _, _ in step_curves(tiny_base, tmp_path)} == {256, 1024, 2048, 2968}


def test_a_broken_file_is_timed_again(tiny_base: Base, tmp_path: Path) -> None:
    machine_costs(tiny_base, tmp_path, None, QUICK)
    (path,) = (tmp_path / "costs").glob("verify-*.json")
    path.write_text("{", encoding="utf-8")
    assert machine_costs(tiny_base, tmp_path, None, QUICK).verify[1][8] > 0


def test_a_combined_configuration_decodes_by_them(tiny_base: Base, tmp_path: Path) -> None:
    heads = random_heads(tiny_base, "hydra++")
    save_checkpoint(tmp_path / "heads", heads, tiny_base.identity, TreeSet({1: PLAIN}), {})
    for kind in ("ngram", "combined"):
        save_configuration(tmp_path / kind, DecodingConfiguration(
            kind, kind, tiny_base.identity, heads=tmp_path / "heads" if kind == "combined" else None))
        drafter, trees = load_heads(tmp_path / kind, tiny_base, lambda found: machine_costs(tiny_base, tmp_path, found, QUICK))
        assert isinstance(drafter, AdaptiveDrafter) and trees is None and (drafter.heads is None) == (kind == "ngram")
        assert drafter.costs.verify[1][8] > 0
        assert Engine(tiny_base, drafter).answer(["abcabcabc"], max_new_tokens=12) == Engine(tiny_base).answer(
            ["abcabcabc"], max_new_tokens=12)


def test_one_sequence_at_a_time_is_timed_alone(tiny_base: Base, tmp_path: Path, fake_clock: list[object]) -> None:
    """Where costs of all batch sizes are known, they are taken."""
    alone = costs_of_one(tiny_base, tmp_path)
    assert set(alone.verify) == {1}
    known = machine_costs(tiny_base, tmp_path)
    assert set(known.verify) > {1} and costs_of_one(tiny_base, tmp_path) == known
