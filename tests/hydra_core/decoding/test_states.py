"""Hidden states that are recorded while decoding are those of one forward over prompt and answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hydra_core.base import Base, load_base
from hydra_core.base.kv_cache import KVCache
from hydra_core.decoding import Engine, Result, naive_generate, scheduler
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.sampling import Request, Typical
from hydra_core.tree import DraftTree, TreeSet
from tests.tiny import save_tiny
from tests.trained import overfit_heads, random_prompts

BUSHY = TreeSet({1: DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)))})
DRAFTERS = ("plain", "ngram", "medusa", "hydra", "hydra++", "adaptive")
KNOWN = random_prompts(4, seed=1)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def heads(tiny_base: Base) -> Callable[[str], HeadDrafter]:
    made: dict[str, HeadDrafter] = {}

    def of(kind: str) -> HeadDrafter:
        if kind not in made:
            made[kind] = overfit_heads(tiny_base, kind, KNOWN, steps=80)
        return made[kind]

    return of


def engine(base: Base, name: str, heads: Callable[[str], HeadDrafter], **changes: int) -> Engine:
    drafters: dict[str, Callable[[], Drafter | None]] = {
        "plain": lambda: None, "ngram": lambda: NgramDrafter(min_match=1),
        "adaptive": lambda: AdaptiveDrafter(heads("hydra++"), NgramDrafter(min_match=1))}
    drafter = drafters.get(name, lambda: heads(name))()
    return Engine(base, drafter, BUSHY if isinstance(drafter, HeadDrafter) else None, **changes)


def asked(prompts: list[tuple[int, ...]], tokens: int = 20, **changes: object) -> list[Request]:
    return [Request(f"r{number}", prompt, tokens, hidden_states=True, **changes)  # type: ignore[arg-type]
            for number, prompt in enumerate(prompts)]


def check(base: Base, results: list[Result]) -> None:
    for result in results:
        assert result.hidden is not None
        torch.testing.assert_close(result.hidden, base.hidden_states([result.prompt_ids + result.token_ids])[0], **CLOSE)


@pytest.mark.parametrize(("name", "rows"), [*((name, 4) for name in DRAFTERS), ("hydra++", 1)])
def test_every_drafter(tiny_base: Base, heads: Callable[[str], HeadDrafter], name: str, rows: int) -> None:
    """Ragged prompts and answers, of which some are one token and some end inside an accepted path. Tokens and counts are those
    of a run that records nothing."""
    requests = asked([*KNOWN, *random_prompts(5, seed=2)])
    requests = [replace(request, max_new_tokens=1 + 5 * number) for number, request in enumerate(requests)]
    free = naive_generate(tiny_base, requests[3]).token_ids
    requests[3] = replace(requests[3], stop_ids=(free[9],))
    results = engine(tiny_base, name, heads, max_batch_size=rows).generate(requests)
    check(tiny_base, results)
    assert len({len(result.token_ids) for result in results}) > 6 and results[3].finish_reason == "stop"
    silent = engine(tiny_base, name, heads, max_batch_size=rows).generate(
        [replace(request, hidden_states=False) for request in requests])
    for one, other in zip(results, silent, strict=True):
        assert (one.token_ids, one.finish_reason, other.hidden) == (other.token_ids, other.finish_reason, None)
        if name not in ("ngram", "adaptive"):  # whose drafts depend on the time of steps
            assert (one.steps, one.drafted, one.accepted_lengths) == (other.steps, other.drafted, other.accepted_lengths)
    if name in ("hydra", "hydra++"):
        assert sum(result.accepted for result in results) > 10


@pytest.mark.parametrize("changes", [
    {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"lossy_typical": Typical(0.2, 0.9), "temperature": 0.7},
    {"stop": ("e", "o", "A")}, {"speculate": False}, {"logprobs": 2}], ids=str)
def test_every_way_to_choose_a_token(tiny_base: Base, heads: Callable[[str], HeadDrafter], changes: dict[str, object]) -> None:
    """Also where the answer is not the base's greedy one, and where it is cut at a string."""
    check(tiny_base, engine(tiny_base, "hydra", heads, max_batch_size=3).generate(asked([*KNOWN, *KNOWN[:2]], **changes)))


@pytest.mark.parametrize("recorded", [True, False])
def test_the_states_of_a_copied_prefix_are_copied(tiny_base: Base, heads: Callable[[str], HeadDrafter], recorded: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """From a sequence that records its own; where it does not, the prefix is computed."""
    copied, copy = list[int](), KVCache.copy_prefix

    def copying(cache: KVCache, source: int, target: int, count: int) -> None:
        copied.append(count)
        copy(cache, source, target, count)

    monkeypatch.setattr(KVCache, "copy_prefix", copying)
    monkeypatch.setattr(scheduler, "CHUNK", 7)
    start = tuple(range(10, 60))
    requests = asked([(*start, *prompt) for prompt in random_prompts(5, seed=4)], tokens=12)
    requests[0] = replace(requests[0], hidden_states=recorded, max_new_tokens=30)
    decoder = engine(tiny_base, "plain", heads, max_batch_size=3)
    results = decoder.generate(requests)
    check(tiny_base, results if recorded else results[1:])
    assert bool(copied) and (recorded or results[0].hidden is None)


def test_the_last_place_of_the_context(tiny_base: Base, heads: Callable[[str], HeadDrafter]) -> None:
    results = engine(tiny_base, "hydra++", heads, max_batch_size=2, context_limit=20).generate(
        asked([prompt[:10] for prompt in KNOWN], tokens=60, stop_ids=()))
    assert {result.finish_reason for result in results} == {"context"}
    check(tiny_base, results)


def test_rows_that_leave_do_not_mix_states(tiny_base: Base, heads: Callable[[str], HeadDrafter]) -> None:
    """Sequences are cancelled while others decode, also in the step that only computes the last state, and rows move."""
    decoder, results = engine(tiny_base, "hydra", heads, max_batch_size=4), list[Result]()
    for request in asked(random_prompts(12, seed=5), tokens=9):
        decoder.add(replace(request, max_new_tokens=3 + int(request.id[1:]) % 7))
    cancelled = set[str]()
    while decoder.has_work:
        ending = [sequence.request.id for sequence in decoder.scheduler.decoding if sequence.ending]
        if len(cancelled) < 3 and ending:
            cancelled.add(ending[0])
            decoder.cancel(ending[0])
        results += [output.result for output in decoder.step() if output.result is not None]
    assert len(cancelled) == 3 and {result.id for result in results if result.hidden is None} == cancelled
    check(tiny_base, [result for result in results if result.id not in cancelled])
    assert not decoder.batch.states


@pytest.mark.parametrize("fused", [True, False])
def test_other_decoders(tmp_path: Path, fused: bool) -> None:
    """PyTorch's operators, which compute empty nodes too, and transformers' own forward."""
    base = load_base(str(save_tiny(tmp_path / "base")), dtype="fp32", cache=tmp_path, native=False, fused=fused)
    assert not base.ragged
    check(base, Engine(base, NgramDrafter(min_match=1), max_batch_size=3).generate(asked(random_prompts(7, seed=6))))
