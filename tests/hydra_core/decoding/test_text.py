"""The joined pieces equal the whole text; stop strings are cut off wherever they are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_core.decoding.text import UNFINISHED, TextStream


def decode_bytes(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=40), st.lists(st.integers(1, 7), min_size=1, max_size=20))
def test_pieces_join_to_the_whole(text: str, sizes: list[int]) -> None:
    data = list(text.encode())
    stream, sent, at, turn = TextStream(decode_bytes), "", 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        piece = stream.push(data[at:at + size])
        assert "\ufffd" not in piece or "\ufffd" in text
        sent, at, turn = sent + piece, at + size, turn + 1
    assert sent + stream.finish() == text == stream.sent


def cut(text: str, stops: list[str]) -> str:
    """What stays of `text`: up to the stop string that is complete first, the longest one of several."""
    ends = {end: stop for stop in sorted(stops, key=len) if (end := text.find(stop) + len(stop)) >= len(stop)}
    return text[:min(ends) - len(ends[min(ends)])] if ends else text


ALPHABETS = ("ab", "ab<>", "aé日\U0001f600\ufffd")


@settings(max_examples=400)
@given(st.data())
def test_stop_strings_end_the_text_however_it_is_cut(data: st.DataObject) -> None:
    """Tokens of one byte, so that characters are cut too; any number of them at once; a stop string may be the beginning, the
    middle or the end of another one."""
    alphabet = data.draw(st.sampled_from(ALPHABETS))
    text = data.draw(st.text(alphabet, max_size=40))
    stops = data.draw(st.lists(st.text(alphabet, min_size=1, max_size=6), max_size=4))
    wanted, stream, sent, at = cut(text, stops), TextStream(decode_bytes, stops), "", 0
    ids = list(text.encode())
    while at < len(ids) and not stream.stopped:
        size = data.draw(st.integers(1, 9))
        piece = stream.push(ids[at:at + size])
        sent, at = sent + piece, at + size
        seen = bytes(ids[:at]).decode(errors="ignore")
        held = len(wanted) - len(sent)
        assert wanted.startswith(sent) and held >= 0
        if not stream.stopped and not seen.endswith("\ufffd"):  # no more is held back than a stop string may need
            ending = max((n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])), default=0)
            assert len(seen) - len(sent) == ending
    sent += stream.finish()
    assert sent == stream.sent == wanted
    assert stream.stopped == (wanted != text)
    if stream.stopped:
        assert stream.push(list(b"more")) == stream.finish() == ""


def test_long_stop_strings_cost_the_same_for_every_token() -> None:
    """A text that is almost each of four stop strings of 255 characters at every place: comparisons of characters are counted."""
    compared = 0

    class Char(str):
        def __ne__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__ne__(self, other)

        __hash__ = str.__hash__

    class Stop(str):
        def __getitem__(self, at: object) -> str:
            return Char(str.__getitem__(self, at))  # type: ignore[index]

    stream = TextStream(decode_bytes, ["a" * 254 + end for end in "1234"])
    for found in stream._stops:
        found.stop = Stop(found.stop)
    for _ in range(1000):
        stream.push(list(b"a"))
    assert stream.sent == "a" * (1000 - 254) and not stream.stopped
    assert 4 * 1000 - 4 <= compared <= 2 * 4 * 1000


def test_unfinished_bytes_come_out_at_the_end() -> None:
    stream = TextStream(decode_bytes)
    assert stream.push(list("é".encode()[:1])) == "" and stream.finish() == "\ufffd"


def decode_runs(ids: list[int]) -> str:
    """As tokenizers' ByteFallback does: a run of bytes that is not valid as a whole is a replacement for each byte."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


NEVER_ENDS = {"stray bytes": (b"\x80" * 600, (1,)), "beginnings": (b"\xf0\x9f" * 300, (1, 2)),
              "replacements": ("\ufffd" * 200, (1, 3)), "out of phase": ("a" + "日" * 200 + "é", (3,)),
              "emoji out of phase": ("ab" + "\U0001f600" * 150, (4,)),
              "in one text": ("日" * 99 + "\ufffd" * 40 + "é" * 99, (5, 1))}


@pytest.mark.parametrize("name", list(NEVER_ENDS))
def test_half_characters_cost_the_same_for_every_token(name: str) -> None:
    """Steps after which the text always ends in half a character: the tokens that are decoded are counted."""
    text, sizes = NEVER_ENDS[name]
    data, decoded = list(text if isinstance(text, bytes) else text.encode()), 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode_bytes(ids)

    stream, at, turn, pieces = TextStream(decode, ["never"]), 0, 0, list[str]()
    while at < len(data):
        before, size = decoded, sizes[turn % len(sizes)]
        pieces.append(stream.push(data[at:at + size]))
        assert decoded - before < 12 * (UNFINISHED + size)
        at, turn = at + size, turn + 1
        assert len(decode_bytes(data[:at])) - len(stream.sent) <= UNFINISHED + 8  # no more waits
    assert "".join(pieces) + stream.finish() == decode_bytes(data) == stream.sent


@pytest.mark.parametrize(("text", "size"), [("x" + "日" * 80, 3), ("xy" + "\U0001f600" * 60, 4), ("日本語x" * 30, 7)])
def test_a_run_of_bytes_is_read_where_it_is_whole(text: str, size: int) -> None:
    """A step's last byte is always the first of a character, which such decoders make a replacement of the whole run."""
    data, longest = list(text.encode()), 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_runs(ids)

    stream = TextStream(decode)
    for at in range(0, len(data), size):
        stream.push(data[at:at + size])
    stream.finish()
    assert stream.sent == text and longest < 3 * UNFINISHED


def test_after_a_stray_byte_a_run_is_read_again() -> None:
    """Such decoders make nothing of the run that it is in, however long; what was sent stays, and the cost is bounded."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode_runs(ids)

    stream = TextStream(decode)
    stream.push([0x80])
    for char in "\U0001f600" * 40:
        stream.push(list(char.encode()))
    assert longest < 3 * UNFINISHED and (stream.sent + stream.finish()).endswith("\U0001f600" * 20)
