"""The engine hands taps to a proposer with every hidden state: of prompts in chunks, of copied prefixes, of accepted nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hydra_core.base import Base
from hydra_core.base.graphs import GraphedForward
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.heads.hydra import Hydra
from hydra_core.proposers import Context
from hydra_core.proposers.heads import HeadKind, HeadProposer
from hydra_core.proposers.registry import KINDS
from hydra_core.sampling import Request
from hydra_core.tree import DraftTree, TreeSet
from tests.trained import overfit_heads, random_prompts

TREES = TreeSet({1: DraftTree(((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))})
TAPS = (1, 0)


class Reading(HeadProposer):
    """Trained heads whose proposer also keeps the taps of each row, [tokens, 2 * D]."""

    kept: dict[int, torch.Tensor]

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        super().admit(row, prompt_ids)
        self.kept[row] = torch.empty(0, 64)

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        super().copy_prefix(source, target, count)
        self.kept[target] = self.kept[source][:count].clone()

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        self.kept[target] = self.kept[source]

    def commit(self, rows: tuple[int, int], hidden: torch.Tensor, counts: torch.Tensor,
               tokens: Sequence[Sequence[int]] = ()) -> None:
        super().commit(rows, hidden[..., :32], counts, tokens)
        for row, states, count in zip(range(*rows), hidden[..., 32:], counts.tolist(), strict=True):
            self.kept[row] = torch.cat((self.kept[row], states[:count]))


class ReadingKind(HeadKind):
    taps = TAPS

    def open(self, context: Context) -> Reading:
        made = Reading(self.drafter, context.trees, context.rows, context.slots)
        made.kept = {}
        return made


@pytest.fixture(scope="module")
def heads(tiny_base: Base) -> HeadDrafter:
    return overfit_heads(tiny_base, "hydra", random_prompts(6, seed=1))


@pytest.mark.parametrize("recorded", [False, True])
def test_taps_of_all_committed_tokens(tiny_base: Base, heads: HeadDrafter, monkeypatch: pytest.MonkeyPatch,
                                      recorded: bool) -> None:
    """At every step the taps of each row are those of a forward over its text, also after rows moved and beside chunks."""
    monkeypatch.setitem(KINDS, Hydra, ReadingKind)
    for name, value in (("BUSY_TOKENS", 24), ("IDLE_TOKENS", 60), ("CHUNK", 20), ("SHARED_TOKENS", 8)):
        monkeypatch.setattr(f"hydra_core.decoding.scheduler.{name}", value)
    engine = Engine(tiny_base, heads, TREES, max_batch_size=3)
    if recorded:
        engine.forward = GraphedForward(tiny_base, engine.cache, engine.draft_slots, lambda run: run, TAPS)
    long = tuple(range(3, 103))
    requests = [Request(f"r{i}", prompt, (9, 40, 21)[i % 3], stop_ids=(), temperature=(0.0, 0.9)[i % 2], seed=i,
                        hidden_states=i % 3 == 0)
                for i, prompt in enumerate([*random_prompts(6, seed=1), long, (*long, 7), (*long[:60], 9)])]
    waiting, results, checked = list(requests), dict[str, Result](), 0
    while waiting or engine.has_work:
        if waiting and engine.waiting < 2:
            engine.add(waiting.pop(0))
        results.update({output.id: output.result for output in engine.step() if output.result})
        proposer: Any = engine.proposer
        for row, sequence in enumerate(engine.scheduler.decoding):
            text = [*sequence.request.prompt_ids, *sequence.tokens][:-1]  # the root is not computed yet
            kept = proposer.kept[row][:len(text)]
            wanted = tiny_base.hidden_states([text], TAPS)[0][:, 32:]
            torch.testing.assert_close(kept, wanted, atol=2e-4, rtol=2e-4)
            checked += 1
    assert checked > 60 and sum(result.accepted for result in results.values()) > 30
    for request in requests:
        assert results[request.id].token_ids == naive_generate(tiny_base, request).token_ids
        hidden = results[request.id].hidden
        assert (hidden is not None) == request.hidden_states and (hidden is None or hidden.shape[1] == 32)


def test_a_change_of_drafters_changes_the_taps(tiny_base: Base, heads: HeadDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request("r", random_prompts(6, seed=1)[2], 40, stop_ids=())
    for reads_first in (False, True):
        first, second = [], []
        with pytest.MonkeyPatch.context() as patch:
            if reads_first:
                patch.setitem(KINDS, Hydra, ReadingKind)
            engine = Engine(tiny_base, heads, TREES, max_batch_size=2)
        engine.add(request)
        for _ in range(3):
            first += engine.step()
        with pytest.MonkeyPatch.context() as patch:
            if not reads_first:
                patch.setitem(KINDS, Hydra, ReadingKind)
            engine.change(engine.prepare(heads, TREES))
        assert (engine.batch.taps == TAPS) == (not reads_first)
        while engine.has_work:
            second += engine.step()
        assert second[-1].result is not None
        assert second[-1].result.token_ids == naive_generate(tiny_base, request).token_ids
        assert second[-1].result.accepted > 3


def test_taps_that_the_base_does_not_have_are_refused(tiny_base: Base, heads: HeadDrafter,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, Hydra, ReadingKind)
    monkeypatch.setattr(ReadingKind, "taps", (1, 2))
    with pytest.raises(InputError, match="taps: layer 2 is not among the 2 layers"):
        Engine(tiny_base, heads, TREES)
