"""Prompt lookup: continue as the text did where the last tokens stood before (PLD). Needs no training."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

LONGEST_MATCH = 32
"""Tokens compared to tell a good match from a chance one; more say nothing more."""
KEPT_ENDS = 8
"""Occurrences of an n-gram that are remembered, the latest ones."""


@dataclass(frozen=True)
class NgramDrafter:
    """Settings of n-gram lookup.

    The last `max_match` tokens, then fewer down to `min_match`, are looked for in prompt and output. Of the latest
    occurrences the one is taken before which most tokens agree; at most `length` tokens that followed it are drafted as
    a chain.
    """

    max_match: int = 3
    min_match: int = 2
    length: int = 15

    def __post_init__(self) -> None:
        if not 1 <= self.min_match <= self.max_match:
            raise ValueError(f"ngram.min_match={self.min_match} must lie between 1 and max_match={self.max_match}")
        if self.length < 1:
            raise ValueError("ngram.length must be at least 1")


@dataclass(frozen=True)
class Match:
    """`tokens`: what may come next; `matched`: how many tokens before them agree, 0 where there is no match."""

    tokens: tuple[int, ...] = ()
    matched: int = 0


@dataclass
class NgramIndex:
    """One row's tokens and, for each n-gram, where its latest occurrences but the current one ended.

    Adding a token and looking up a match take a bounded number of operations, however long the text.
    """

    drafter: NgramDrafter
    tokens: list[int] = field(default_factory=list)
    _ends: dict[tuple[int, ...], deque[int]] = field(default_factory=dict)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens. An n-gram is indexed only once another token follows it, so it never matches itself."""
        for token in tokens:
            for size in range(self.drafter.min_match, self.drafter.max_match + 1):
                if len(self.tokens) >= size:
                    gram = tuple(self.tokens[-size:])
                    ends = self._ends.get(gram)
                    if ends is None:
                        ends = self._ends[gram] = deque(maxlen=KEPT_ENDS)
                    ends.append(len(self.tokens))
            self.tokens.append(token)

    def match(self, length: int) -> Match:
        """`length` tokens that may come next.

        A match that runs up to the end of the text is carried on periodically, as LZ77 copies do: text that has begun
        to repeat itself is drafted to full length.
        """
        for size in range(self.drafter.max_match, self.drafter.min_match - 1, -1):
            ends = self._ends.get(tuple(self.tokens[-size:])) if len(self.tokens) >= size else None
            if ends:
                matched, end = max((self._agreeing(end, size), end) for end in ends)
                period = len(self.tokens) - end
                return Match(tuple(self.tokens[end + i % period] for i in range(length)), matched)
        return Match()

    def _agreeing(self, end: int, known: int) -> int:
        """Tokens before `end` that agree with the newest ones; the last `known` are known to."""
        tokens, last = self.tokens, len(self.tokens)
        most = min(end, LONGEST_MATCH)
        count = known
        while count < most and tokens[end - 1 - count] == tokens[last - 1 - count]:
            count += 1
        return count
