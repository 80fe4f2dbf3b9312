"""The protocol of a proposer, which fills draft trees with tokens, and the records that it and the engine exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

from torch import Tensor

from hydra_core.base.kv_cache import KVCache
from hydra_core.sampling.request import TokenLogprob
from hydra_core.sampling.sampler import Sampler
from hydra_core.tree.batch import TreeBatch


@dataclass(frozen=True)
class StepTimes:
    """Wall-clock seconds by phase, and the number of `steps` (base forwards over draft trees) that they cover.

    `prefill`: prompts; `draft`: filling trees, prefix layer included; `verify`: the base's forward and logits; `accept`:
    choosing tokens; `commit`: moving keys and values and handing tokens on. `predicted`: what the proposer's cost table
    predicts for draft, verify, accept and commit together, 0 without a table. On a GPU, queued work is counted in the phase
    that waits for it.
    """

    steps: int = 0
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    commit: float = 0.0
    predicted: float = 0.0

    def __sub__(self, earlier: StepTimes) -> StepTimes:
        return StepTimes(*(getattr(self, part.name) - getattr(earlier, part.name) for part in fields(self)))

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Proposal:
    """Draft trees with their tokens.

    `tokens`: [B, N] int64, node 0 the root; -1 marks an empty node, and empty nodes come last; `trees`: their shapes;
    `seconds`: predicted time of the step, 0 where the proposer predicts nothing.
    """

    tokens: Tensor
    trees: TreeBatch
    seconds: float = 0.0


@dataclass(frozen=True)
class Accepted:
    """What verification accepts.

    `path`: [B, M] int64, the accepted nodes from the root down, padded by repeating the last one, M at most the trees'
    depth + 1; `counts`: [B] int64, accepted nodes, root included; `emitted`: for each sequence the base's choice after each
    accepted node; `logprobs`: for each sequence and choice, where they are requested.
    """

    path: Tensor
    counts: Tensor
    emitted: list[list[int]]
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


class Proposer(Protocol):
    """Drafts for the running sequences, and keeps what it needs to know of each.

    Sequences occupy rows 0 .. B - 1 without holes, the rows of the KV cache. Per step the engine calls `propose`, then
    `commit`, then `feedback`; `admit` and `copy_prefix` when a prompt starts, `end` and `move` when a sequence ends. What a
    proposer learns changes the speed only, never a token. `reads_next`: what it keeps of a token depends on the token after it,
    so that of a shared prefix the last token is computed again.
    """

    max_nodes: int
    reads_next: bool

    @property
    def kv_caches(self) -> tuple[KVCache, ...]:
        """Its own keys and values over the tokens of the base's cache, row by row, which `catch_up` completes."""
        ...

    def catch_up(self, row: int) -> None:
        """Bring `kv_caches` to all committed tokens of `row`."""
        ...

    def restored(self, row: int, count: int) -> None:
        """A prompt's first `count` tokens are in `row` of the base's cache and of `kv_caches`, and are not computed."""
        ...

    def admit(self, row: int, prompt_ids: Sequence[int]) -> None:
        """A new sequence takes `row`; nothing is kept of the one before."""
        ...

    def adopt(self, row: int, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
        """A sequence that another proposer drafted for continues in `row`; `tokens`: its answer so far, the last of which is the
        next root. False: nothing useful can be drafted for it, since hidden states of its past would be needed."""
        ...

    def copy_prefix(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of row `target` are those of row `source` and are not computed again."""
        ...

    def propose(self, roots: Tensor, positions: Sequence[int], samplers: Sequence[Sampler]) -> Proposal:
        """Draft trees below `roots` [B] int64 at `positions` [B]; `samplers`: how each sequence chooses its tokens."""
        ...

    def commit(self, rows: tuple[int, int], hidden: Tensor, counts: Tensor, tokens: Sequence[Sequence[int]] = ()) -> None:
        """Rows [start, stop) grow.

        `hidden`: [B, M, D], the base's hidden states of the tokens that are now in the KV cache, the first `counts` [B] of each
        row, or [B, M, (1 + T) * D] with the T taps that the drafter asks for behind them; `tokens`: for each row its newly
        chosen tokens, the last of which is the next root and not in the cache yet. Chunks of a prompt come with hidden states
        alone, the first token of an answer with tokens alone (M = 0).
        """
        ...

    def feedback(self, accepted: Accepted, times: StepTimes, kept: Sequence[bool] | None = None) -> None:
        """What was accepted of the latest proposal, and the time of its step so far, commit included.

        It comes before any row moves. `kept`: [B], false for sequences whose drafts the engine dropped, of which only the roots
        were verified; None: it dropped none.
        """
        ...

    def end(self, row: int) -> None:
        """The answer in `row` is finished, or cancelled; another sequence may take the row."""
        ...

    def move(self, source: int, target: int) -> None:
        """The sequence of row `source` continues in row `target`, whose own sequence has ended."""
        ...
