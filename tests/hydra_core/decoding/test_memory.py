"""The estimate of an engine's memory against what it allocates."""

from __future__ import annotations

from pathlib import Path

from hydra_core.base import Base
from hydra_core.decoding import Engine
from hydra_core.decoding.memory import _left_in_group, cache_bytes, workspace_bytes
from hydra_core.proposers import AdaptiveDrafter, NgramDrafter
from tests.trained import random_heads


def test_caches_take_what_was_said(tiny_base: Base) -> None:
    heads = random_heads(tiny_base, "hydra++")
    for drafter in (None, NgramDrafter(), AdaptiveDrafter(heads)):
        engine = Engine(tiny_base, drafter, max_batch_size=3, context_limit=50)
        prefix = engine.proposer.inputs.cache.nbytes if isinstance(drafter, AdaptiveDrafter) else 0  # type: ignore[attr-defined]
        assert engine.cache.nbytes + prefix == cache_bytes(tiny_base, drafter, 3, engine.cache.slots)


def test_more_rows_nodes_and_tokens_take_more(tiny_base: Base) -> None:
    least = workspace_bytes(tiny_base, 1, 64, 1)
    assert 0 < least < workspace_bytes(tiny_base, 8, 64, 1) < workspace_bytes(tiny_base, 8, 64, 16)
    assert least < workspace_bytes(tiny_base, 1, 250, 1)


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    assert _left_in_group(tmp_path) > 2**50
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _left_in_group(tmp_path) > 2**50
    (tmp_path / "memory.max").write_text("10000\n")
    assert _left_in_group(tmp_path) == 7000
