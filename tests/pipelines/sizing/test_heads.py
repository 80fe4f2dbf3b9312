"""Heads on torch's meta device are the heads that are trained, and their file has the bytes that the formula gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.heads import HeadsConfig
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import load_config
from pipelines.sizing.base import shape_from, shape_of
from pipelines.sizing.heads import heads_of_model, heads_shape
from tests.trained import random_heads

CASES: list[dict[str, Any]] = [{"kind": "medusa"}, {"kind": "hydra", "mlp": "gated", "final_norm": False},
                               {"kind": "hydra", "recurrent": True}, {"kind": "hydra++", "draft_vocab_size": 100},
                               {"kind": "hydra", "own_rows": True, "skip_bias": True}]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_parameters_and_bytes_of_every_kind(tiny_base: Base, tmp_path: Path, fields: dict[str, Any]) -> None:
    heads = random_heads(tiny_base, **fields)
    base = shape_from("tiny", tiny_base.vocabulary.config, "fp32")
    found = heads_shape(base, heads.config)
    assert found.parameters == sum(one.numel() for one in heads.parameters())
    assert found.draft_vocab == len(heads.draft_vocab)
    held = sum(one.nbytes for one in heads.parameters()) + heads.rows.weight.nbytes
    assert found.weight_bytes(4) == held
    save_checkpoint(tmp_path / "heads", heads, tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    size = (tmp_path / "heads" / "model.safetensors").stat().st_size
    assert 0 <= size - found.saved_bytes(4) < 8192  # the header


def test_heads_of_a_folder_of_the_package_and_of_the_settings(tiny_base: Base, tmp_path: Path) -> None:
    heads = random_heads(tiny_base, "medusa")
    save_checkpoint(tmp_path / "heads", heads, tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    base = shape_from("tiny", tiny_base.vocabulary.config, "fp32")
    config = load_config(None, {"train.drafters.big.kind": "hydra++", "train.drafters.big.num_heads": 9})
    for folder in (tmp_path, tmp_path / "heads"):  # of a configuration, and of heads
        found, note = heads_of_model(config, base, str(folder))
        assert found is not None and found.config == heads.config and not note
    largest, note = heads_of_model(config, base, "models:/x@champion")
    assert largest is not None and largest.config.num_heads == 9 and "assumed" in note
    assert heads_of_model(config, base, "plain") == (None, "")
    bundled, note = heads_of_model(config, shape_of("embedded:smollm2-135m", "bf16", None, tmp_path), "bundled")
    assert bundled is not None and isinstance(bundled.config, HeadsConfig) and bundled.config.kind == "hydra" and not note
