"""llama.cpp beside the others: on the very file that the base was made from, where its package is installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hydra_core.base import EMBEDDED_BASE, Base
from hydra_core.decoding import compare, naive_generate
from hydra_core.errors import InputError
from hydra_core.sampling import Request
from pipelines.bench.llama_cpp import check_llama, llama_contender
from pipelines.bench.plan import BenchPlan
from pipelines.bench.stage import _plan, run_bench
from pipelines.config import load_config
from tests.gguf_file import write_gguf
from tests.packages import pretend

missing = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None,
                             reason="llama-cpp-python is an extra and is not installed here")


def plan_of(folder: Path, model: Path) -> BenchPlan:
    config = load_config(None, {"storage": str(folder), "base.model": str(model), "base.dtype": "fp32", "bench.threads": 1})
    return _plan(config, folder / "bench", ("plain", "llama.cpp"), {})


class FakeLlama:
    """A model of ten tokens that counts up from the last one, and remembers what it was asked to compute."""

    def __init__(self, path: str, **settings: Any) -> None:
        self.path, self.settings, self.ctx = path, settings, self
        self.calls: list[Any] = []
        self.logits = np.zeros(10, dtype=np.float32)

    def n_vocab(self) -> int:
        return len(self.logits)

    def reset(self) -> None:
        self.calls.append("reset")

    def eval(self, tokens: Any) -> None:
        self.calls.append(tuple(tokens))
        self.logits[:] = 0
        self.logits[tokens[-1] + 1:] = 1  # of equals the first is chosen


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeLlama]:
    """Stands in for the package; the models made of it."""
    made: list[FakeLlama] = []

    def make(path: str, **settings: Any) -> FakeLlama:
        made.append(FakeLlama(path, **settings))
        return made[-1]

    module = SimpleNamespace(Llama=make, llama_get_logits_ith=lambda ctx, place: np.ctypeslib.as_ctypes(ctx.logits))
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    pretend(monkeypatch, "llama_cpp", installed=True)
    return made


def test_greedy_from_the_beginning_each_time(fake: list[FakeLlama], tmp_path: Path) -> None:
    base: Any = SimpleNamespace(vocab_size=10, stop_ids=(7,), device=SimpleNamespace(type="cpu"))
    run = llama_contender(plan_of(tmp_path, tmp_path / "m.gguf"), base, 50)
    (llm,) = fake
    assert llm.path.endswith("m.gguf") and llm.settings["n_ctx"] == 50 and not llm.settings["logits_all"]
    assert (llm.settings["n_threads"], llm.settings["n_threads_batch"], llm.settings["n_gpu_layers"]) == (1, 1, 0)
    found = run((1, 2), 3)
    assert found.token_ids == (3, 4, 5) and found.steps == 2 and found.prefill_seconds > 0 and found.decode_seconds > 0
    assert run((1, 5), 9).token_ids == (6, 7)  # to the token that ends an answer, which counts
    assert run((1, 6), 9).token_ids == (7,)
    assert llm.calls == ["reset", (1, 2), (3,), (4,), "reset", (1, 5), (6,), "reset", (1, 6)]
    with pytest.raises(InputError, match="has 10 tokens, the base 11"):
        llama_contender(plan_of(tmp_path, tmp_path / "m.gguf"), SimpleNamespace(**vars(base) | {"vocab_size": 11}), 50)


def test_asked_for_where_it_cannot_be_had(tiny_base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "llama_cpp", installed=False)
    for model in (EMBEDDED_BASE, "/data/m.gguf"):
        with pytest.raises(InputError, match=r"needs the package llama-cpp-python: pip install 'hydra-heads\[llama\]'"):
            check_llama(model)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "x"}\n', encoding="utf-8")
    values = {"storage": str(tmp_path), "base.model": str(tiny_base_dir), "bench.prompts": str(prompts),
              "bench.methods": ["llama.cpp"]}
    with pytest.raises(InputError, match=r"GGUF file, which base\.model=.* is not"):
        run_bench(load_config(None, values))
    with pytest.raises(InputError, match="is none of"):  # which samples otherwise
        run_bench(load_config(None, values | {"bench.temperature": 1.0}))
    assert not (tmp_path / "runs").exists()


@missing
def test_what_the_real_one_says(tiny_base_dir: Path, tiny_base: Base, tmp_path: Path) -> None:
    """On the tiny base in float32: the naive loop's tokens but for near-ties, as its keys and values are kept in 16 bits;
    and the same whatever was decoded before."""
    write_gguf(tiny_base_dir, tmp_path / "m.gguf")
    run = llama_contender(plan_of(tmp_path, tmp_path / "m.gguf"), tiny_base, 100)
    prompts = [(1, 5, 6, 7), (1, 5, 6, 90, 91), tuple(range(3, 60))]
    answers = [run(prompt, 24).token_ids for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        found = compare(tiny_base, prompt, naive_generate(tiny_base, Request("r", prompt, 24)).token_ids, answer)
        assert found.verdict == "identical" or (found.gap or 0) < 0.02, found
    assert [run(prompt, 24).token_ids for prompt in reversed(prompts)] == answers[::-1]
