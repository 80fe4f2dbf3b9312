"""The rows of a text file as the world writes them: JSON lines, a JSON array, CSV; compressed; in UTF-8 or UTF-16.

What cannot be read is named as what it is. Files are read as a stream, but for a JSON array, which is held whole.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from hydra_core.errors import InputError
from hydra_core.storage import open_stream

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
"""First bytes -> the codec's name in Arrow."""
XZ = b"\xfd7zXZ\x00"
OTHERS = {b"PK\x03\x04": "a zip archive: unpack it", b"PAR1": "a Parquet file: name it .parquet",
          b"ARROW1": "an Arrow file: write it as Parquet", b"SQLite format 3": "an SQLite database", b"%PDF": "a PDF",
          b"\x89HDF": "an HDF5 file"}
BOMS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
CSV = {".csv": ",", ".tsv": "\t"}
LONGEST_LINE = 64 << 20
"""Bytes; a longer line is no row."""
_HEAD = 4096


class BadLine(ValueError):
    """A line that holds no row; the text says why."""


def read_values(path: Path, tap: Callable[[bytes], object] | None = None) -> Iterator[tuple[int, Any]]:
    """The JSON value of each row with its number from 1; a BadLine in its place where a row cannot be read.

    JSON lines: numbers are those of lines, and blank lines hold no row. A JSON array: those of its elements. CSV (.csv, .tsv):
    those of lines, the first one names the columns, all values are text.
    `tap`: called with the bytes of the file as they are read, each once and in order, as they lie there; empty at the end.
    Raises InputError for a file that is something else, or that cannot be read to its end.
    """
    try:
        with open_stream(path) as raw, _decompressed(raw, path, tap) as binary:
            head = binary.read(_HEAD)
            encoding = _encoding(head, path)
            stream = _Prefixed(head, binary)
            name = path.name.lower()
            for suffix in (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4"):
                name = name.removesuffix(suffix)
            suffix = Path(name).suffix
            if suffix in CSV:
                yield from _csv(stream, encoding, CSV[suffix], path)
            elif _begins_array(head, encoding):
                yield from _array(stream, encoding, path)
            elif encoding in ("utf-8", "utf-8-sig"):
                yield from _lines(stream, encoding)
            else:
                yield from _decoded_lines(stream, encoding, path)
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise InputError(f"{path}: cannot be read to its end ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def _decompressed(raw: IO[bytes], path: Path, tap: Callable[[bytes], object] | None) -> Any:
    first = raw.read(16)
    raw.seek(0)
    source: Any = raw if tap is None else _Tapped(raw, tap)
    if first.startswith(XZ):
        return lzma.open(source)
    for magic, codec in COMPRESSIONS.items():
        if first.startswith(magic):
            return pa.CompressedInputStream(pa.PythonFile(source, mode="r"), codec)
    for magic, what in OTHERS.items():
        if first.startswith(magic):
            raise InputError(f"{path}: is {what}; rows are read from JSON lines, a JSON array, CSV or Parquet")
    return source


class _Tapped(io.RawIOBase):
    """A stream of which another one sees all that is read."""

    def __init__(self, raw: Any, tap: Callable[[bytes], object]) -> None:
        self._raw, self._tap = raw, tap

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._raw.readinto(buffer))
        self._tap(bytes(memoryview(buffer)[:count]))
        return count


class _Prefixed(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._head:
            piece, self._head = self._head[:len(buffer)], self._head[len(buffer):]
        else:
            piece = self._rest.read(len(buffer))
        buffer[:len(piece)] = piece
        return len(piece)


def _encoding(head: bytes, path: Path) -> str:
    for bom, name in BOMS:
        if head.startswith(bom):
            return name
    if b"\x00" in head[:64]:
        if head[1::2][:32].count(0) > 8:
            return "utf-16-le"
        if head[::2][:32].count(0) > 8:
            return "utf-16-be"
        raise InputError(f"{path}: is a binary file; rows are read from JSON lines, a JSON array, CSV or Parquet")
    return "utf-8"


def _begins_array(head: bytes, encoding: str) -> bool:
    return head.decode(encoding, errors="ignore").lstrip("\ufeff \t\r\n").startswith("[")


def _lines(stream: Any, encoding: str) -> Iterator[tuple[int, Any]]:
    reader, number = io.BufferedReader(stream, 1 << 20), 0
    while raw := reader.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            while raw and not raw.endswith(b"\n"):
                raw = reader.readline(LONGEST_LINE)
            yield number, BadLine(f"is longer than {LONGEST_LINE >> 20} MiB")
            continue
        if number == 1 and encoding == "utf-8-sig":
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if raw.strip():
            yield number, _parsed(raw)


def _decoded_lines(stream: Any, encoding: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        for number, line in enumerate(io.TextIOWrapper(io.BufferedReader(stream), encoding=encoding, newline="\n"), start=1):
            if line.strip("\ufeff \t\r\n"):
                yield number, _parsed(line.encode("utf-8", errors="surrogatepass").removeprefix(codecs.BOM_UTF8))
    except UnicodeDecodeError:
        raise InputError(f"{path}: begins as {encoding.upper()} text and is none: write it as UTF-8") from None


def _parsed(raw: bytes) -> Any:
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        return BadLine("is not UTF-8 text")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # an endless number or nesting is no syntax error to `json`
        if text.endswith(","):  # lines cut out of an array
            try:
                return json.loads(text[:-1])
            except (ValueError, RecursionError):
                pass
        return BadLine(f"is not JSON ({getattr(error, 'msg', error)}){_hint(text)}")


def _hint(text: str) -> str:
    if text in ("{", "[") or (text.startswith("{") and not text.endswith("}")):
        return ": one object must stand on one line"
    return ""


def _array(stream: Any, encoding: str, path: Path) -> Iterator[tuple[int, Any]]:
    raw = io.BufferedReader(stream).read()
    try:
        text = raw.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not {encoding.upper()} text") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip() not in ("", "[", "]")]
        parsed = [(number, _parsed(line.encode("utf-8", errors="surrogatepass"))) for number, line in lines]
        if not any(isinstance(value, dict) for _, value in parsed):
            where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{path}: begins as a JSON array and is none ({getattr(error, 'msg', error)}{where})") from None
        yield from parsed  # JSON lines after a list, or an array with one comma too many
        return
    yield from enumerate(values, start=1)


def _csv(stream: Any, encoding: str, delimiter: str, path: Path) -> Iterator[tuple[int, Any]]:
    text = io.TextIOWrapper(io.BufferedReader(stream), encoding=encoding, newline="")
    csv.field_size_limit(LONGEST_LINE)
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                yield reader.line_num, BadLine(f"has not the {len(reader.fieldnames or ())} columns that the first line names")
            else:
                yield reader.line_num, dict(row)
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not {encoding.upper()} text") from None
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: is not CSV ({error})") from None
