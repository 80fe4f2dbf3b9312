"""Incremental decoding of token ids to text: no partial characters; stop strings are cut off even when they span tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not a complete character
UNFINISHED = 16
"""Tokens that may wait for the end of a character. A character has four bytes at most, but where each step brings several tokens,
the end of one may always come together with the beginning of the next."""
WINDOW = 8
"""Tokens that are decoded again where no character ends: more than twice those of one character."""


class _StopString:
    """How much of a stop string the text ends with, by the automaton of Knuth, Morris and Pratt (1977): a constant number of
    operations for each character on average, whatever the length of the stop string."""

    def __init__(self, stop: str) -> None:
        self.stop, self.matched = stop, 0
        self._shorter = [0]  # for each beginning of `stop`: the longest shorter one that it ends with
        length = 0
        for char in stop[1:]:
            length = self._grown(length, char)
            self._shorter.append(length)

    def read(self, char: str) -> bool:
        """Add a character to the text; whether the stop string is complete with it."""
        self.matched = self._grown(self.matched, char)
        return self.matched == len(self.stop)

    def _grown(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._shorter[length - 1]
        return length + (self.stop[length] == char)


class TextStream:
    """Text of one answer while its tokens arrive; the pieces, joined, are the whole text.

    `decode`: token ids to text; `stops`: strings that end the answer and are not part of it. The one that is complete first
    ends it, the longest of those that are complete with the same character; how the text is cut into tokens makes no difference.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [_StopString(stop) for stop in sorted(set(stops), key=len, reverse=True) if stop]
        self._ids: list[int] = []
        self._begin = self._read = 0  # the text of ids[:_read] is complete; decoding restarts at `_begin`, a few tokens earlier
        self._taken = 0               # characters after that text which cannot change any more; -1: its last one still may
        self._held = ""               # characters that may be the beginning of a stop string
        self._pieces: list[str] = []
        self.stopped = False

    @property
    def sent(self) -> str:
        """All text so far."""
        return "".join(self._pieces)

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; returns the text that can no longer change. Returns nothing once `stopped`."""
        self._ids += ids
        return self._advance(final=False)

    def finish(self) -> str:
        """The rest: partial characters as they are, and text that only looked like the start of a stop string."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        if self.stopped:
            return ""
        fresh = self._without_stops(self._decoded(final))
        if final and not self.stopped:
            fresh, self._held = fresh + self._held, ""
        self._pieces.append(fresh)
        return fresh

    def _decoded(self, final: bool) -> str:
        """The characters that were not taken yet and cannot change any more. Only the newest tokens are decoded, together with a
        few before them, as some tokenizers need."""
        text = self._decode(self._ids[self._begin:])
        start = max(len(self._decode(self._ids[self._begin:self._read])) + self._taken, 0)
        whole = text if final else text.rstrip(REPLACEMENT)
        if not text.endswith(REPLACEMENT):
            self._restart(self._read, len(self._ids), 0)
        elif len(self._ids) - self._read <= UNFINISHED:
            self._taken += max(len(whole) - start, 0)
        elif (ended := self._last_end()) is not None:
            head = self._decode(self._ids[self._begin:ended])
            whole = max(head, whole, key=len)  # some decoders make all of a run of bytes replacements while its end is missing
            self._restart(self._read, ended, max(len(whole), start) - len(head))
        else:  # bytes that are no character: only the last of them can become one
            held = 0 if final else self._decode(self._ids[-WINDOW:]).endswith(REPLACEMENT)
            whole = text[:len(text) - held]
            self._restart(len(self._ids) - WINDOW, len(self._ids), -held)
        return whole[start:]

    def _restart(self, begin: int, read: int, taken: int) -> None:
        self._begin, self._read, self._taken = begin, read, taken

    def _last_end(self) -> int | None:
        """How many tokens there are up to the end of a character among the last few, or None."""
        ends = range(len(self._ids) - 1, len(self._ids) - 4, -1)
        return next((end for end in ends if not self._decode(self._ids[self._begin:end]).endswith(REPLACEMENT)), None)

    def _without_stops(self, fresh: str) -> str:
        """The held characters and `fresh`, up to a stop string or to what may be the beginning of one."""
        if not self._stops:
            return fresh
        text = self._held + fresh
        for count, char in enumerate(fresh, start=len(self._held) + 1):
            complete = [found.stop for found in self._stops if found.read(char)]  # all of them have to read it
            if complete:
                self.stopped, self._held = True, ""
                return text[:count - len(complete[0])]
        sure = len(text) - max(found.matched for found in self._stops)
        self._held = text[sure:]
        return text[:sure]
