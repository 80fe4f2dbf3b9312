"""Score a draft tree without decoding: walk the rank tuples of held-out rows.

A row of R response tokens at positions p .. p + R - 1 has a tuple for each t = p - 1 .. p + R - 3: entry i is the rank
at which head i, fed the true path, drafted x_{t+2+i}. Decoding starts at t = p - 1 with the first response token as
root (it comes from the prefill and takes no step). A step accepts as many tokens as the longest tree path that is a prefix of
the tuple, emits one more token of the base, and moves forward by accepted + 1:

    response   r0 | r1 r2 r3 | r4 | r5 r6 |        steps 3, tokens after the first 6, tokens per step 2
    tuple at   t=p-1 (accepts 2)  t=p+2 (0)  t=p+3 (1)

The end of the row may cut the last step short, as a limit or stop token does in the engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_core.tree.draft_tree import DraftTree

MISS = 2**31 - 1
"""The rank of a token that cannot be drafted, or that lies beyond the row's end."""


@dataclass(frozen=True)
class RankRows:
    """Rank tuples of several rows: `ranks` [P, K] int64 and how many positions each row has (they sum to P)."""

    ranks: Tensor
    positions: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.ranks.ndim != 2 or sum(self.positions) != self.ranks.shape[0]:
            raise ValueError(f"{sum(self.positions)} positions do not fit ranks {tuple(self.ranks.shape)}")

    @property
    def heads(self) -> int:
        """K, the entries of a tuple."""
        return self.ranks.shape[1]

    @classmethod
    def concatenate(cls, parts: Iterable[RankRows]) -> RankRows:
        """All rows of `parts` in order. Raises ValueError for none."""
        parts = list(parts)
        if not parts:
            raise ValueError("no rank rows to concatenate")
        return cls(torch.cat([part.ranks for part in parts]), tuple(n for part in parts for n in part.positions))


@dataclass(frozen=True)
class Walk:
    """The counts of a walk: base forwards after prefill, and tokens after the first of each row."""

    steps: int
    tokens: int

    def __add__(self, other: Walk) -> Walk:
        return Walk(self.steps + other.steps, self.tokens + other.tokens)

    @property
    def tokens_per_step(self) -> float:
        """1.0, as plain decoding, for a walk without steps."""
        return self.tokens / self.steps if self.steps else 1.0


def accepted_lengths(tree: DraftTree, ranks: Tensor) -> Tensor:
    """Number of tokens that `tree` accepts at each tuple of ranks [P, K]: [P] int64."""
    accepted = torch.zeros(ranks.shape[0], dtype=torch.int64)
    matched: dict[tuple[int, ...], Tensor] = {(): torch.ones(ranks.shape[0], dtype=torch.bool)}
    for path in tree.paths:  # parents come first
        if len(path) > ranks.shape[1]:
            raise ValueError(f"tree path {path} is deeper than the {ranks.shape[1]} heads")
        here = matched[path[:-1]] & (ranks[:, len(path) - 1] == path[-1])
        matched[path] = here
        accepted = torch.where(here, accepted.clamp(min=len(path)), accepted)
    return accepted


def walk_steps(accepted: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Steps of each row when it moves forward by accepted + 1 from its first position: [rows] int64."""
    counts = torch.tensor(positions, dtype=torch.int64)
    ends = torch.cumsum(counts, 0)
    at = ends - counts
    steps = torch.zeros_like(counts)
    live = at < ends
    while bool(live.any()):  # all rows together: as many rounds as the longest row has steps
        steps += live
        at = torch.where(live, at + 1 + accepted[torch.where(live, at, 0)], at)
        live = at < ends
    return steps


def walk(tree: DraftTree, rows: RankRows) -> Walk:
    """Steps and tokens of decoding `rows` with `tree`; the plain tree takes one step per token.

    Raises ValueError if the tree is deeper than the rows have heads.
    """
    steps = walk_steps(accepted_lengths(tree, rows.ranks), rows.positions)
    return Walk(int(steps.sum()), sum(rows.positions))
