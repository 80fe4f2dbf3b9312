"""Prompt lookup: continue as the text did where the last tokens stood before (PLD). Needs no training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class NgramDrafter:
    """Settings of n-gram lookup.

    The last `max_match` tokens, then fewer down to `min_match`, are looked for in prompt and output, latest
    occurrence first; `length` tokens that followed it are drafted as a chain.
    """

    max_match: int = 3
    min_match: int = 2
    length: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.min_match <= self.max_match:
            raise ValueError(f"ngram.min_match={self.min_match} must lie between 1 and max_match={self.max_match}")
        if self.length < 1:
            raise ValueError("ngram.length must be at least 1")


@dataclass
class NgramIndex:
    """One row's tokens and, for each n-gram, where its latest occurrence but the current one ended.

    Adding a token and looking up a match take a constant number of hash operations.
    """

    drafter: NgramDrafter
    tokens: list[int] = field(default_factory=list)
    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens. An n-gram is indexed only once another token follows it, so it never matches itself."""
        for token in tokens:
            for size in range(self.drafter.min_match, self.drafter.max_match + 1):
                if len(self.tokens) >= size:
                    self._ends[tuple(self.tokens[-size:])] = len(self.tokens)
            self.tokens.append(token)

    def draft(self, length: int) -> list[int]:
        """`length` tokens that may come next; empty without a match.

        A match that runs up to the end of the text is carried on periodically, as LZ77 copies do: text that has begun
        to repeat itself is drafted to full length.
        """
        for size in range(self.drafter.max_match, self.drafter.min_match - 1, -1):
            if len(self.tokens) >= size:
                end = self._ends.get(tuple(self.tokens[-size:]))
                if end is not None:
                    period = len(self.tokens) - end
                    return [self.tokens[end + i % period] for i in range(length)]
        return []
