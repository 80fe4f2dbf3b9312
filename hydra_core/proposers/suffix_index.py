"""Tokens in which the latest occurrences of a context are found at once: a bounded text with chains of equal n-grams.

What a suffix tree answers, "what followed this context, and how often", without its nodes: each place in the text knows the
place before it with the same n-gram, as the matcher of DEFLATE does (RFC 1951, section 4), and the longer agreement is read off
the text. A token takes the same few bytes whatever surrounds it, where a tree of depth 16 has up to 16 nodes for it, and the
oldest tokens leave by being overwritten.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

GRAMS = (6, 3, 2)
"""Sizes of the n-grams that are looked up, longest first: a shorter one only where no longer one occurred."""
LONGEST_MATCH = 16
"""Most tokens that are compared; more tell nothing more."""
VISITS = 32
"""Most places that are looked at for one n-gram, latest first."""
END = -1
"""Stands behind each piece: it equals no token, so neither matches nor continuations go across it."""

Place = tuple[int, int]
"""How many tokens before it agree with the context, and the place of the token that followed there."""


class SuffixIndex:
    """The latest `capacity` tokens of the pieces of text that were added. Adding a token and finding places take a bounded
    number of operations, however long the text.

    Places count from the first token ever added, so they stay the same while older ones leave.
    """

    def __init__(self, capacity: int, grams: Sequence[int] = GRAMS) -> None:
        self.capacity, self.grams = capacity, tuple(grams)
        self.forget()

    def forget(self) -> None:
        """Drop all tokens, and give their memory back."""
        self.count = 0
        self._tokens = array("i")
        self._tail: tuple[int, ...] = ()                                # the latest tokens of the piece that is being added
        self._latest = [dict[int, int]() for _ in self.grams]           # n-gram -> place
        self._before = [array("q") for _ in self.grams]                 # place -> the place before it with the same n-gram
        self._keys = [array("q") for _ in self.grams]                   # place -> n-gram: what leaves must leave `_latest` too

    def __len__(self) -> int:
        """Tokens that are kept, and ends of pieces among them."""
        return len(self._tokens)

    @property
    def oldest(self) -> int:
        """The first place that is still kept."""
        return self.count - len(self._tokens)

    def extend(self, tokens: Sequence[int], context: int = 0) -> None:
        """Add tokens to the present piece. The first `context` of them are never found themselves, only what follows them."""
        for number, token in enumerate(tokens):
            self._add(token, number >= context)

    def end_piece(self) -> None:
        """The next tokens have nothing to do with those before."""
        if self._tail:
            self._add(END, False)
            self._tail = ()

    def _add(self, token: int, found: bool) -> None:
        tail, slot = self._tail, self.count % self.capacity
        full = len(self._tokens) == self.capacity
        for size, latest, before, keys in zip(self.grams, self._latest, self._before, self._keys, strict=True):
            if full and latest.get(keys[slot]) == self.count - self.capacity:
                del latest[keys[slot]]
            key, place = 0, -1
            if found and len(tail) >= size:
                key = hash(tail[-size:])
                place = latest.get(key, -1)
                latest[key] = self.count
            if full:
                keys[slot], before[slot] = key, place
            else:
                keys.append(key)
                before.append(place)
        if full:
            self._tokens[slot] = token
        else:
            self._tokens.append(token)
        self._tail = (*tail[-self.grams[0] + 1:], token)
        self.count += 1

    def find(self, context: Sequence[int]) -> list[Place]:
        """Places whose preceding tokens agree with the last ones of `context`, latest first: those of the longest n-gram that
        occurred."""
        for level, size in enumerate(self.grams):
            if len(context) < size:
                continue
            place, oldest = self._latest[level].get(hash(tuple(context[-size:])), -1), self.oldest
            before, found, visits = self._before[level], list[Place](), 0
            while place >= oldest and visits < VISITS:  # what left the text is older than all that is in it
                if (matched := self._agreeing(place, context)) >= size:  # else another n-gram, or a part has left
                    found.append((matched, place))
                place = before[place % self.capacity]
                visits += 1
            if found:
                return found
        return []

    def _agreeing(self, place: int, context: Sequence[int]) -> int:
        tokens, capacity, last = self._tokens, self.capacity, len(context) - 1
        most, count = min(place - self.oldest, last + 1, LONGEST_MATCH), 0
        while count < most and tokens[(place - 1 - count) % capacity] == context[last - count]:
            count += 1
        return count

    def following(self, place: int, length: int) -> list[int]:
        """Up to `length` tokens from `place` on, within its piece."""
        begin, most = place % self.capacity, min(length, self.count - place)
        tokens = self._tokens[begin:begin + most].tolist()
        if len(tokens) < most:
            tokens += self._tokens[:most - len(tokens)].tolist()
        return tokens[:tokens.index(END)] if END in tokens else tokens
