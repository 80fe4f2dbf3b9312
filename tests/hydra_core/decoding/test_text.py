"""The joined pieces equal the whole text; stop strings are cut off wherever they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hydra_core.decoding.text import TextStream


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


@given(st.text("ab<>", max_size=30), st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
def test_stop_strings(text: str, stops: list[str], size: int) -> None:
    data = list(text.encode())
    stream, sent = TextStream(decode_bytes, stops), ""
    for at in range(0, len(data), size):
        sent += stream.push(data[at:at + size])
        if stream.stopped:
            break
    sent += stream.finish()
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if size == 1 or not found:  # with several tokens at once, a later but longer-seen stop may not come into play
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        cut = min((text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)), default=None)
        assert sent == (text if cut is None else text[:cut])
    assert stream.stopped == bool(found)
    assert all(stop not in sent for stop in stops)


def test_unfinished_bytes_come_out_at_the_end() -> None:
    stream = TextStream(decode_bytes)
    assert stream.push(list("é".encode()[:1])) == "" and stream.finish() == "\ufffd"
