"""What drafts depend on besides the text, held still: every phase of a step takes the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydra_core.decoding import Engine
from hydra_core.decoding.clock import Clock
from hydra_core.proposers.base import Proposal


class SteadyClock(Clock):
    """Every phase takes `seconds`: dynamic trees follow the time of steps, and with it two runs draft the same."""

    def __init__(self, seconds: float = 0.001) -> None:
        super().__init__()
        self.seconds = seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield
        self.totals[name] += self.seconds


Recorded = list[tuple[dict[str, tuple[int, ...]], Proposal]]


def recorded_proposals(engine: Engine) -> Recorded:
    """From now on every proposal of `engine`, with the request of each row and its tokens so far, under a steady clock."""
    found: Recorded = []
    engine.clock, propose = SteadyClock(), engine.proposer.propose

    def recording(*given: object) -> Proposal:
        proposal = propose(*given)  # type: ignore[arg-type]
        found.append(({one.request.id: (*one.request.prompt_ids, *one.tokens) for one in engine.scheduler.decoding},
                      Proposal(proposal.tokens.clone(), proposal.trees, proposal.seconds)))
        return proposal

    engine.proposer.propose = recording  # type: ignore[method-assign]
    return found
