"""Incremental decoding of token ids to text: no partial characters; stop strings are cut off even when they span tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # decoders write it for bytes that are not a complete character


class TextStream:
    """Text of one answer while its tokens arrive; the pieces, joined, are the whole text.

    `decode`: token ids to text; `stops`: strings that end the answer and are not part of it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stop for stop in stops if stop)
        self._ids: list[int] = []
        self._begin = self._read = 0  # ids[:_read] are in `_whole`; decoding restarts at `_begin`, a few tokens earlier
        self._whole = ""
        self.sent = ""
        self.stopped = False

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
        text = self._decoded()
        found = [at for at in (text.find(stop, max(0, len(self.sent) - len(stop))) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            text = text[:min(found)]
        elif not final:
            text = text.rstrip(REPLACEMENT)
            text = text[:len(text) - self._held_back(text)]
        fresh = text[len(self.sent):]
        self.sent += fresh
        return fresh

    def _decoded(self) -> str:
        """The text so far. Only the newest tokens are decoded, together with a few before them, as some tokenizers need."""
        before = self._decode(self._ids[self._begin:self._read])
        after = self._decode(self._ids[self._begin:])
        text = self._whole + after[len(before):]
        if not after.endswith(REPLACEMENT):
            self._whole, self._begin, self._read = text, self._read, len(self._ids)
        return text

    def _held_back(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
