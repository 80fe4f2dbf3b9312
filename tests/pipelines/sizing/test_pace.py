"""Times: figures that were measured lie in the ranges, and a CPU's come from the cache of step costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from hydra_core.base import Base
from pipelines.config import TreeSection, load_config
from pipelines.profiling.cost_cache import machine_costs
from pipelines.sizing.base import BaseShape, shape_from, shape_of
from pipelines.sizing.hardware import ACCELERATORS
from pipelines.sizing.pace import CpuPace, GpuPace, pace_of, timed_costs
from pipelines.sizing.serving import serve_size

H200 = next(one for one in ACCELERATORS if one.name == "H200")
SEVEN_B = shape_from("7b", LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                                       num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False), "bf16")


@pytest.mark.parametrize(("name", "rows", "low", "high"), [
    ("7b", 1, 4.70e-3, 4.70e-3), ("7b", 32, 6.9e-3, 6.9e-3), ("135m", 1, 1.53e-3, 1.53e-3), ("135m", 256, 40e-3, 80e-3)])
def test_steps_measured_on_an_h200_lie_in_the_range(tmp_path: Path, name: str, rows: int, low: float, high: float) -> None:
    """The figures of hydra_core/DESIGN.md, "On a GPU", at 512 tokens of context."""
    base = SEVEN_B if name == "7b" else shape_of("embedded:smollm2-135m", "bf16", None, tmp_path)
    found = GpuPace(H200, H200).step(base, rows, 512)
    assert found.low <= low and high <= found.high < 12 * high


def test_a_cpus_pace_is_the_cached_one(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path) -> None:
    base = shape_of(str(tiny_base_dir), "fp32", None, tmp_path)
    assert timed_costs(base, tmp_path) is None
    pace, why = pace_of(base, False, None, tmp_path)
    assert pace is None and "was timed on this machine yet" in why
    settings = TreeSection(batch_sizes=(1, 2), node_counts=(1, 4), context=32, far_contexts=(128,), repeats=3)
    costs = machine_costs(tiny_base, tmp_path, None, settings)
    pace, _ = pace_of(base, False, None, tmp_path)
    assert isinstance(pace, CpuPace)
    for rows, context in ((1, 32), (2, 100)):
        step = pace.step(base, rows, context)
        assert step.low < costs.verify_seconds(rows, 1, context) < step.high
    assert pace.forward(base, 1000).low < 1000 * costs.verify_seconds(2, 4) / 8 * 1.001
    other = BaseShape(**{**vars(base), "dtype": "bf16"})
    assert timed_costs(other, tmp_path) is None  # of another format
    (path,) = (tmp_path / "costs").glob("verify-*.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"machine": {"device": "another processor"}}), encoding="utf-8")
    assert timed_costs(base, tmp_path) is None


def test_an_endpoint_tells_its_speed(tmp_path: Path) -> None:
    config = load_config(None, {"serve.max_batch_size": 4, "serve.model": "plain"})
    size = serve_size(config, SEVEN_B, GpuPace(H200, H200), "", True)
    assert size.seconds is None and "1 sequence: " in size.notes[0] and "4 sequences: " in size.notes[0]
    assert "datasheet of H200" in size.notes[0]
