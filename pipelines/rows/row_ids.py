"""Ids of many rows in little memory: 16 bytes each, in a sorted array that tasks of Ray read without a copy.

A content id is 32 hexadecimal digits, which are its 16 bytes. Any other id is hashed to as many.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

_CONTENT_ID = re.compile(r"[0-9a-f]{32}")
_KIND = "S16"
_AT_ONCE = 1 << 14


def row_digests(ids: Iterable[str]) -> np.ndarray:
    """The digests of `ids`, in their order: [n] of 16 bytes."""
    return np.array([_digest(name) for name in ids], _KIND)


def merged(*digests: np.ndarray) -> np.ndarray:
    """All digests sorted, each once."""
    return np.unique(np.concatenate([np.empty(0, _KIND), *digests]))


def repeated(digests: np.ndarray) -> np.ndarray:
    """Those that occur more than once, sorted, each once."""
    found, counts = np.unique(digests, return_counts=True)
    return found[counts > 1]


def among(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which of `digests` are in the sorted `known`: [n] bool."""
    if not len(known):
        return np.zeros(len(digests), bool)
    place = np.minimum(np.searchsorted(known, digests), len(known) - 1)
    found: np.ndarray = known[place] == digests
    return found


def is_content_id(name: str) -> bool:
    """Whether an id can be read back from its digest."""
    return _CONTENT_ID.fullmatch(name) is not None


def content_id_of(digests: np.ndarray, *parts: Any) -> str:
    """`schemas.content_id(*parts, ids)` of the sorted content ids with these digests, without a list of them."""
    hashed = hashlib.sha256(json.dumps([*parts, []], sort_keys=True, ensure_ascii=False)[:-2].encode())
    for number, name in enumerate(_content_ids(digests)):
        hashed.update(f'{", " if number else ""}"{name}"'.encode())
    hashed.update(b"]]")
    return hashed.hexdigest()[:32]


def _digest(name: str) -> bytes:
    return bytes.fromhex(name) if is_content_id(name) else hashlib.blake2b(name.encode(), digest_size=16).digest()


def _content_ids(digests: np.ndarray) -> Iterator[str]:
    for start in range(0, len(digests), _AT_ONCE):
        text = digests[start:start + _AT_ONCE].tobytes().hex()
        yield from (text[at:at + 32] for at in range(0, len(text), 32))
