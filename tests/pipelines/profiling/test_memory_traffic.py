"""Bytes that a step reads, against the sizes of the tensors themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.base.linear import FrozenLinear, draft_bytes, quantisable
from hydra_core.tree.costs import StepCosts
from pipelines.profiling.memory_traffic import Reads, reads_of
from tests.trained import random_heads

COSTS = StepCosts({1: {1: 0.010, 4: 0.012}}, {1: {0: 0.001, 3: 0.002}})


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_every_matrix_is_read_once_and_the_vocabulary_by_every_head(kind: str, tiny_base: Base) -> None:
    heads = random_heads(tiny_base, kind, draft_vocab_size=100)
    found = reads_of(tiny_base, heads, COSTS)
    assert found is not None
    width, inner, vocab = 32, 64, 288
    layer = width * (4 + 2 * 2) * 8 + width * width + 3 * inner * width
    assert found.base_bytes == 4 * (2 * layer + vocab * width)
    matrices = sum(weight.numel() for weight in heads.parameters() if weight.ndim == 2)
    assert found.draft_bytes == 4 * (matrices + 3 * len(heads.draft_vocab) * width)
    assert heads.bytes_read(0) == 0 < heads.bytes_read(1) < heads.bytes_read(3)
    assert (found.depth, found.base_seconds, found.draft_seconds) == (3, 0.010, 0.002)


def test_one_head_for_all_depths_is_read_once(tiny_base: Base) -> None:
    heads = random_heads(tiny_base, "hydra", draft_vocab_size=100, recurrent=True)
    rows = 4 * len(heads.draft_vocab) * 32
    assert heads.bytes_read(3) - heads.bytes_read(1) == 2 * rows


def test_nothing_is_said_of_what_was_not_timed(tiny_base: Base) -> None:
    heads = random_heads(tiny_base, "medusa")
    for costs in (StepCosts({4: {1: 0.01}}, {4: {3: 0.002}}), StepCosts({1: {1: 0.01}}, {1: {0: 0.002}})):
        assert reads_of(tiny_base, heads, costs) is None


def test_figures_by_hand() -> None:
    reads = Reads(4, 200_000_000, 0.010, 20_000_000, 0.002)
    assert reads.figures() == {"depth": 4, "base_mb": 200.0, "base_gb_per_s": 20.0, "draft_mb": 20.0, "draft_gb_per_s": 10.0,
                               "bytes_share": 0.1, "seconds_share": 0.2}
    assert reads.sentence() == ("drafting with 4 heads reads 20.0 MB, 10.0 GB/s; a plain step 200.0 MB, 20.0 GB/s: "
                                "10% of its bytes, 20% of its time")


def test_four_bit_copies_are_as_large_as_they_are_said_to_be() -> None:
    for shape in ((64, 576), (1152, 1152), (20, 30)):
        weight = torch.randn(shape).bfloat16()
        made = FrozenLinear.for_drafts(weight)
        assert (made.few is not None) == quantisable(weight)
        assert draft_bytes(weight) == made.bytes_read


def test_a_base_that_transformers_runs_has_layouts_of_its_own(tiny_base_dir: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_core.base.fused.FusedDecoder.reason_unsupported", staticmethod(lambda *_: "a test"))
    base = load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path)
    assert reads_of(base, random_heads(base, "medusa"), COSTS) is None
