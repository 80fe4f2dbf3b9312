"""Hostile and odd inputs, each with what becomes of it. Made here, by code where they are binary or large."""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Bad:
    """A row that is an error, or a file that is refused; `words`: what its line says."""

    words: str


@dataclass(frozen=True)
class FileCase:
    """A file of prompts. `rows`: the user's words of each row, or Bad; a single Bad instead: the whole file is refused."""

    name: str
    content: bytes
    rows: tuple[str | Bad, ...] | Bad


@dataclass(frozen=True)
class ChatCase:
    """A chat as a file holds it (`messages`) or as a body over HTTP. `system`: the words before the user's. `over_http`: where
    a body means something else than the same chat in a file."""

    messages: Any
    found: str | Bad
    system: str = ""
    over_http: str | Bad | None = None


def lines(*values: Any) -> bytes:
    return "".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)) + "\n"
                   for value in values).encode()


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue().to_pybytes())


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


A, B = {"prompt": "first"}, {"prompt": "second"}
BOTH = ("first", "second")
CALL = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
ODD = ("a\u0000b", "a\u2028b\u2029c\u0085d", "e\u0301 \u202eright\u202c to left", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
       "\ufeffmark inside", "tab\there", "\\ud800 in words", "{{ system }} {% raw %}", "a'); DROP TABLE rows; --",
       "../../etc/passwd")

FILES: dict[str, FileCase] = {
    "plain": FileCase("p.jsonl", lines(A, B), BOTH),
    "byte order mark, Windows line ends": FileCase("p.jsonl", b"\xef\xbb\xbf" + lines(A, B).replace(b"\n", b"\r\n"), BOTH),
    "UTF-16 with mark": FileCase("p.jsonl", lines(A, B).decode().encode("utf-16"), BOTH),
    "UTF-16 without mark": FileCase("p.jsonl", lines(A, B).decode().encode("utf-16-le"), BOTH),
    "UTF-32": FileCase("p.jsonl", lines(A, B).decode().encode("utf-32"), BOTH),
    "gzip": FileCase("p.jsonl.gz", gzip.compress(lines(A, B)), BOTH),
    "gzip under another name": FileCase("p.jsonl", gzip.compress(lines(A, B)), BOTH),
    "two gzip members": FileCase("p.jsonl.gz", gzip.compress(lines(A)) + gzip.compress(lines(B)), BOTH),
    "zstandard": FileCase("p.jsonl.zst", zstd(lines(A, B)), BOTH),
    "gzip that was cut": FileCase("p.jsonl.gz", gzip.compress(lines(*[A, B] * 2000))[:60], Bad("cannot be read to its end")),
    "array": FileCase("p.json", json.dumps([A, B], indent=2).encode(), BOTH),
    "lines out of an array": FileCase("p.jsonl", b'{"prompt": "first"},\n{"prompt": "second"},\n', BOTH),
    "array that was cut": FileCase("p.json", b'[{"prompt": "first"', Bad("begins as a JSON array and is none")),
    "blank lines": FileCase("p.jsonl", b"\n\n" + lines(A) + b"  \r\n\t\n" + lines(B) + b"\n", BOTH),
    "no line end": FileCase("p.jsonl", lines(A, B).rstrip(), BOTH),
    "CSV": FileCase("p.csv", b'id,prompt\r\n1,first\r\n2,"sec""ond,\nthird"\r\n3\r\n',
                    ("first", 'sec"ond,\nthird', Bad("columns"))),
    "TSV": FileCase("p.tsv", b"prompt\tid\nfirst\t1\nsecond\t2\n", BOTH),
    "Parquet": FileCase("p.parquet", parquet(prompt=["first", None, "second"]), ("first", Bad("is empty or not text"), "second")),
    "Parquet with null keys": FileCase("p.parquet", parquet(messages=pa.array(
        [[user("first", name=None, tool_calls=None)], [user("second", name=None, tool_calls=None)]],
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string()),
                            ("tool_calls", pa.list_(pa.string()))])))), BOTH),
    "Parquet, a chat as JSON text": FileCase("p.parquet", parquet(messages=[json.dumps([user("first")])]), ("first",)),
    "Parquet under another name": FileCase("p.jsonl", parquet(prompt=["first"]), Bad("a Parquet file: name it .parquet")),
    "text under Parquet's name": FileCase("p.parquet", lines(A), Bad("cannot be read as Parquet")),
    "empty": FileCase("p.jsonl", b"", Bad("is empty")),
    "a mark alone": FileCase("p.jsonl", b"\xef\xbb\xbf", Bad("is empty")),
    "an empty array": FileCase("p.json", b"[]", Bad("is empty")),
    "a zip archive": FileCase("p.jsonl", b"PK\x03\x04\x14\x00", Bad("a zip archive: unpack it")),
    "a binary file": FileCase("p.jsonl", bytes(range(256)) * 3, Bad("a binary file")),
    "text that is no rows": FileCase("p.jsonl", b"Dear all,\nplease find attached\n", Bad("is not JSON")),
    "another column": FileCase("p.jsonl", lines({"question": "x", "answer": "y"}), Bad("its fields: question, answer")),
    "bad lines among good ones": FileCase(
        "p.jsonl", lines(A, "{", "[1]", "3", "null", '"text"', {"prompt": 5}, {"prompt": ""}, {"prompt": "  "}, {"prompt": None},
                         {}, B),
        ("first", Bad("one object must stand on one line"), *[Bad("is not an object")] * 4, *[Bad("is empty or not text")] * 4,
         Bad("has no field"), "second")),
    "half a character": FileCase("p.jsonl", lines(A) + b'{"prompt": "\\ud83d"}\n{"prompt": "x", "id": "\\udfff"}\n' + lines(B),
                                 ("first", *[Bad("half a character")] * 2, "second")),
    "a whole pair of escapes": FileCase("p.jsonl", b'{"prompt": "\\ud83d\\ude00"}\n', ("\U0001f600",)),
    "bytes that are no UTF-8": FileCase("p.jsonl", lines(A) + b'{"prompt": "\xff"}\n' + lines(B),
                                        ("first", Bad("not UTF-8"), "second")),
    "Latin-1": FileCase("p.jsonl", lines(A) + '{"prompt": "Grüße"}\n'.encode("latin-1"), ("first", Bad("not UTF-8"))),
    "nested without end": FileCase("p.jsonl", lines(A) + b'{"prompt": ' + b"[" * 100_000 + b"\n", ("first", Bad("is not JSON"))),
    "a number without end": FileCase("p.jsonl", lines(A) + b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}\n",
                                     ("first", Bad("is not JSON"))),
    "a key twice": FileCase("p.jsonl", b'{"prompt": "lost", "prompt": "first"}\n', ("first",)),
    "odd words": FileCase("p.jsonl", lines(*({"prompt": text} for text in ODD)), ODD),
    "ShareGPT": FileCase("p.jsonl", lines({"conversations": [{"from": "human", "value": "first"},
                                                             {"from": "gpt", "value": "no"}]},
                                          {"conversation": [{"from": "user", "text": "second"}]}), BOTH),
    "null beside a chat": FileCase("p.jsonl", lines({"prompt": None, "messages": [user("first")]}), ("first",)),
    "a chat without a question": FileCase("p.jsonl", lines(A, {"messages": [{"role": "assistant", "content": "x"}]}),
                                          ("first", Bad("no user's turn"))),
}

CHATS: dict[str, ChatCase] = {
    "one turn": ChatCase([user("hi")], "hi"),
    "parts": ChatCase([user([{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}])], "hi"),
    "developer": ChatCase([{"role": "developer", "content": "Be brief."}, user("hi", name="ann")], "hi", "Be brief."),
    "null-filled": ChatCase([user("hi", name=None, tool_calls=None, tool_call_id=None)], "hi"),
    "empty lists": ChatCase([user("hi", tool_calls=[])], "hi"),
    "upper case": ChatCase([{"role": "USER", "content": "hi"}], "hi"),
    "none": ChatCase([], Bad("messages: is empty"), over_http=Bad("at least 1 item")),
    "no list": ChatCase({"role": "user"}, Bad("list")),
    "a number": ChatCase([7], Bad("[0] is a number"), over_http=Bad("valid dictionary")),
    "no role": ChatCase([{"content": "hi"}], Bad("[0] has no `role`")),
    "another role": ChatCase([user("hi"), {"role": "king", "content": "x"}], Bad("[1].role is 'king'")),
    "no content": ChatCase([{"role": "user"}], Bad("[0] has no `content`")),
    "null content": ChatCase([user(None)], Bad("[0].content is null")),
    "empty content": ChatCase([user("")], Bad("[0].content is empty")),
    "a picture": ChatCase([user([{"type": "image_url", "image_url": {"url": "x"}}])], Bad("of type 'image_url'")),
    "a part that is no text": ChatCase([user([{"type": "text", "text": 3}])], Bad("[0].content[0].text is a number")),
    "null content without calls": ChatCase([user("hi"), {"role": "assistant", "content": None}, user("x")],
                                           Bad("content is null")),
    "an unknown key": ChatCase([user("hi", weight=1)], "hi", over_http=Bad("weight: is not known")),
    "half a character": ChatCase([user("\ud83d")], Bad("half a character")),
}


def bodies() -> dict[str, tuple[dict[str, Any], str | Bad]]:
    """Fields of a request beside its messages, with what is said of them; an empty text: it is taken."""
    return {
        "nulls": ({"max_tokens": None, "temperature": None, "top_p": None, "n": None, "stop": None, "seed": None,
                   "logprobs": None, "tools": None, "response_format": None, "stream_options": None, "logit_bias": None,
                   "user": None}, ""),
        "what has no effect": ({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1, "stop": [],
                                "user": "u", "metadata": {}, "store": False, "parallel_tool_calls": True}, ""),
        "tools": ({"tools": [{}]}, Bad("tools=")), "unknown": ({"top_a": 5}, Bad("'top_a': unknown parameter")),
        "temperature as text": ({"temperature": "1"}, Bad("temperature")), "too hot": ({"temperature": 1e9}, Bad("temperature")),
        "NaN": ({"temperature": float("nan")}, Bad("temperature")), "infinite": ({"top_p": float("inf")}, Bad("top_p")),
        "no tokens": ({"max_tokens": 0}, Bad("max_tokens")), "fewer": ({"max_tokens": -1}, Bad("max_tokens")),
        "a share of a token": ({"max_tokens": 1.5}, Bad("max_tokens")),
        "no answers": ({"n": 0}, Bad("n")), "many answers": ({"n": 10**6}, Bad("n: at most")),
        "an empty stop": ({"stop": [""]}, Bad("stop")), "five stops": ({"stop": ["a", "b", "c", "d", "e"]}, Bad("stop")),
        "a long stop": ({"stop": "x" * 300}, Bad("stop")), "a mode": ({"speculative": "maybe"}, Bad("speculative")),
    }
