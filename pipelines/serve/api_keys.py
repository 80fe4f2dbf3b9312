"""API keys: read where the application is deployed, passed on only as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from hydra_core.errors import InputError

VARIABLE = "HYDRA_HEADS_API_KEYS"
SHORTEST = 16
"""Minimum characters of a key: the digests of shorter ones could be guessed."""


def key_digests(path: str | None) -> tuple[str, ...]:
    """sha256 in hex of the keys in the file `path` (one a line) and in the environment variable (separated by commas or lines);
    empty: the endpoint needs no key.

    Raises InputError, whose message never contains a key, for a file that cannot be read, has no key or is open to others, and
    for a bad key.
    """
    keys = [(VARIABLE, number, key) for number, key in enumerate(_words(os.environ.get(VARIABLE, "")), start=1)]
    if path is not None:
        lines = private_text("serve.api_keys_file", path).splitlines()
        found = [(path, row, line.strip()) for row, line in enumerate(lines, start=1)
                 if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"serve.api_keys_file={path}: holds no key: write one a line")
        keys += found
    for where, row, key in keys:
        if len(key) < SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{where}: key {row}: must be {SHORTEST} or more printable ASCII characters without spaces")
    return tuple(sorted({hashlib.sha256(key.encode()).hexdigest() for _, _, key in keys}))


def check_required(required: bool, given: bool) -> None:
    """Raise InputError where keys are required and none is given: without one anybody could ask."""
    if required and not given:
        raise InputError("serve.require_keys=true: there is no API key: give serve.api_keys_file, or set "
                         f"{VARIABLE} on the machine that starts the application")


def private_text(setting: str, path: str) -> str:
    """The text of a file with secrets, which `setting` names. Raises InputError, whose message has no secret, for one that
    cannot be read or that others may read.

    As ssh does with private keys: a file of one's own that others can read is refused. Those of others, and those on a
    read-only mount (a secret of Kubernetes, whose modes the platform sets), are not for the user of this process to protect."""
    try:
        found = os.stat(path)
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{setting}={path}: cannot be read as text") from None
    if found.st_uid == os.getuid() and found.st_mode & 0o077 and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise InputError(f"{setting}={path}: others may read it (mode {found.st_mode & 0o777:o}): run chmod 600 {path}")
    return text


def _words(text: str) -> list[str]:
    return [word.strip() for line in text.splitlines() for word in line.split(",") if word.strip()]


def opens(authorization: str | None, digests: Sequence[str]) -> bool:
    """Whether the header `Bearer KEY` has one of the keys. All digests are compared, so that the time tells nothing."""
    scheme, _, key = (authorization or "").partition(" ")
    given = hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest()
    fits = [hmac.compare_digest(given, digest) for digest in digests]
    return scheme.lower() == "bearer" and any(fits)
