"""Files as the world writes them are read, or named as what they are; no row is lost in silence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_core.errors import InputError
from pipelines.rows.text_files import LONGEST_LINE, BadLine, read_values

ROWS = [{"prompt": "Say hi."}, {"prompt": "Grüße, 日本 😀"}, {"prompt": "3"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def read(path: Path, content: bytes) -> list[object]:
    path.write_bytes(content)
    return [value for _, value in read_values(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("form", ["lines", "array", "commas"])
def test_encodings(tmp_path: Path, encoding: str, ends: str, form: str) -> None:
    text = {"lines": LINES, "array": json.dumps(ROWS, indent=2, ensure_ascii=False),
            "commas": LINES.replace("}\n", "},\n")}[form]
    assert read(tmp_path / "p.jsonl", text.replace("\n", ends).encode(encoding)) == ROWS


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl", "p.json"])
def test_compressed(tmp_path: Path, compress: Callable[[bytes], bytes], name: str) -> None:
    """By what the file holds, whatever its name says."""
    assert read(tmp_path / name, compress(LINES.encode())) == ROWS
    assert read(tmp_path / name, compress(json.dumps(ROWS).encode("utf-8-sig"))) == ROWS


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstd])
def test_a_compressed_file_that_was_cut_is_told(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    whole = compress((LINES * 4000).encode())
    with pytest.raises(InputError, match=r"p\.jsonl\.gz: cannot be read to its end"):
        read(tmp_path / "p.jsonl.gz", whole[:len(whole) // 2])


@pytest.mark.parametrize(("content", "told"), [
    (b"PK\x03\x04rest", "a zip archive: unpack it"), (b"PAR1....", "a Parquet file: name it .parquet"),
    (b"%PDF-1.7 \x00", "a PDF"), (bytes(range(256)) * 9, "a binary file"), (b"[1, 2", "begins as a JSON array and is none"),
    (b'[{"prompt": "a"},]', "begins as a JSON array and is none .*line 1")])
def test_what_is_something_else_is_named(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(InputError, match=rf"p\.jsonl: .*{told}"):
        read(tmp_path / "p.jsonl", content)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{\n"prompt": "b"}\n\xff\n{"prompt": "c"}')
    found = list(read_values(tmp_path / "p"))
    assert [number for number, value in found if not isinstance(value, BadLine)] == [1, 6]
    told = {number: str(value) for number, value in found if isinstance(value, BadLine)}
    assert set(told) == {3, 4, 5} and "one object must stand on one line" in told[3] and told[5] == "is not UTF-8 text"


def test_lists_on_lines_are_lines(tmp_path: Path) -> None:
    assert read(tmp_path / "p", b'[1, 2]\n{"prompt": "a"}\n') == [[1, 2], {"prompt": "a"}]


def test_a_line_without_end_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.rows.text_files.LONGEST_LINE", 1000)
    first, second = read(tmp_path / "p", b'{"prompt": "' + b"x" * 5000 + b'"}\n{"prompt": "a"}\n')
    assert isinstance(first, BadLine) and second == {"prompt": "a"} and LONGEST_LINE >= 1 << 20


def test_csv(tmp_path: Path) -> None:
    text = 'id,prompt\n1,"Say ""hi"", then\nstop."\n2,b\n3\n4,c,d\n'
    for name, content in (("p.csv", text.encode("utf-8-sig")), ("p.csv.gz", gzip.compress(text.encode())),
                          ("p.tsv", text.replace(",", "\t").replace("\t then", ", then").encode())):
        rows = read(tmp_path / name, content)
        assert rows[0] == {"id": "1", "prompt": 'Say "hi", then\nstop.'} and rows[1] == {"id": "2", "prompt": "b"}
        assert [isinstance(row, BadLine) for row in rows] == [False, False, True, True]


def test_nothing_in_it(tmp_path: Path) -> None:
    for content in (b"", b"\n \n", b"\xef\xbb\xbf", b"[]", gzip.compress(b"")):
        assert read(tmp_path / "p.jsonl", content) == []


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["p.jsonl", "p.csv", "p.json.gz"]))
def test_any_bytes_are_rows_bad_lines_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, content: bytes,
                                                        name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        for number, value in read_values(path):
            assert number >= 1 and (not isinstance(value, BadLine) or "\n" not in str(value))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
