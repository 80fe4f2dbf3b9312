"""Prompt lookup decoding: if the last tokens occurred before, draft what followed them there. Needs no training.

Prompt lookup decoding (Saxena, 2023), https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

LONGEST_MATCH = 32
"""Most tokens that are compared to tell a good match from a chance one; more tell nothing more."""
KEPT_ENDS = 8
"""Latest occurrences of an n-gram that are remembered."""


@dataclass(frozen=True)
class NgramDrafter:
    """Settings of n-gram lookup.

    The last `max_match` tokens are looked up in prompt and output, then fewer, down to `min_match`. Among the latest
    occurrences, the one with the longest agreeing context is taken; up to `length` tokens that followed it are drafted as a
    chain. Raises ValueError unless 1 <= min_match <= max_match and length >= 1.
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
    """`tokens`: the predicted continuation; `matched`: how many tokens before it agree, 0 where there is no match."""

    tokens: tuple[int, ...] = ()
    matched: int = 0


@dataclass
class NgramIndex:
    """The tokens of one sequence and, for each n-gram, where its latest occurrences before the current one ended.

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
        """Predict the next `length` tokens.

        A match that reaches the end of the text is continued periodically, as LZ77 copies are: text that has begun to repeat
        itself is drafted to full length.
        """
        for size in range(self.drafter.max_match, self.drafter.min_match - 1, -1):
            ends = self._ends.get(tuple(self.tokens[-size:])) if len(self.tokens) >= size else None
            if ends:
                matched, end = max((self._agreeing(end, size), end) for end in ends)
                period = len(self.tokens) - end
                return Match(tuple(self.tokens[end + i % period] for i in range(length)), matched)
        return Match()

    def _agreeing(self, end: int, least: int) -> int:
        """Number of tokens before `end` that agree with the newest ones, of which the last `least` are known to agree."""
        tokens, last = self.tokens, len(self.tokens)
        most = min(end, LONGEST_MATCH)
        count = least
        while count < most and tokens[end - 1 - count] == tokens[last - 1 - count]:
            count += 1
        return count
