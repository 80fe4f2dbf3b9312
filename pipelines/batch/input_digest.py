"""The digest of a job's input, and that the rows which are read are those of that input."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.storage import as_path, open_stream
from pipelines.batch.reader import BadRow, BatchRow, input_kind, read_rows
from pipelines.config import RunConfig
from pipelines.rows.prompt_reader import prompt_files
from pipelines.rows.schemas import content_id
from pipelines.runtime import artifacts
from pipelines.runtime.artifacts import RunPaths, require_manifest


class InputChanged(InputError):
    """The input is another one than when the job began, and some of its rows were read already."""


def input_digest(config: RunConfig) -> str:
    """Of the bytes of all files, or the fingerprint of the stage that has written them. Raises InputError for an input that is
    missing or cannot be read."""
    input_kind(config.batch)  # raises for one that is missing
    if config.batch.source is None:
        return str(require_manifest(RunPaths.of(config).stage("distill"), "distill")["fingerprint"])
    return content_id(*(artifacts.input_digest("batch.input", file) for file in prompt_files(as_path(config.batch.source))))


def unchanged_rows(config: RunConfig, wanted: str) -> Iterator[BatchRow | BadRow]:
    """Every row of the input, in order. Raises InputChanged at its end when its digest is not `wanted`.

    A text file is hashed as it is read: a file that takes its place meanwhile changes no row. Parquet is not read from front to
    back, and is read once more.
    """
    read = _Read()
    try:
        yield from read_rows(config, read)
    except InputError:
        _check(config, wanted, None)  # that it cannot be read is for that reason, perhaps
        raise
    _check(config, wanted, read)


def _check(config: RunConfig, wanted: str, read: _Read | None) -> None:
    """Raise InputChanged unless the digest of what was `read` is `wanted`; None: of what lies there now."""
    try:
        found = (content_id(read.digest(as_path(str(config.batch.source)))) if read is not None and read.bytes
                 else input_digest(config))
    except (OSError, InputError) as error:
        found = str(error)
    if found != wanted:
        raise input_changed(config)


def input_changed(config: RunConfig) -> InputChanged:
    """What a job is told whose input is another one now."""
    return InputChanged(f"batch.input={config.batch.source}: changed while it was read")


class _Read:
    """sha256 of the bytes of a file that were read so far."""

    def __init__(self) -> None:
        self._sha, self.bytes, self._ended = hashlib.sha256(), 0, False

    def __call__(self, piece: bytes) -> None:
        self._sha.update(piece)
        self.bytes += len(piece)
        self._ended = self._ended or not piece

    def digest(self, path: Path) -> str:
        """Of the whole file; what no row was read from (`batch.limit`) is read now."""
        if not self._ended:
            with open_stream(path) as rest:
                rest.seek(self.bytes)
                while piece := rest.read(1 << 20):
                    self(piece)
        return self._sha.hexdigest()
