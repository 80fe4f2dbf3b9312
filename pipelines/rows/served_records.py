"""Records of answers that an endpoint gave, which `distill` makes rows of.

    FOLDER/part-TIME-WRITER-DIGEST.jsonl    one JSON object a line; TIME: Unix milliseconds at which the part was written

A part appears whole or not at all. One that a disk or a copy has cut off is read up to its damage: hence lines, and not Parquet,
whose rows cannot be found without its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra_core.storage import is_remote, listing, name_in, open_stream
from pipelines.rows.prompt_reader import RowError
from pipelines.rows.schemas import content_id
from pipelines.runtime.files import atomic_file, remove_file

SCHEMA_VERSION = 1
_PART = re.compile(r"part-(\d{13})-[A-Za-z0-9]+-[0-9a-f]{8}\.jsonl")
NEUTRAL: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                           "repetition_penalty": 1.0}
"""Settings of a request that change the base's distribution, with the values at which they do not."""


@dataclass(frozen=True)
class ServedRecord:
    """One answer. `time`: Unix seconds at its end; `settings`: those of `NEUTRAL` that were others, and `speculative`;
    `accepted`: drafts accepted in each step after the first token; `base`: the identity of the base, with digest and weight
    format; `heads`: digest of the configuration that drafted when it began; `version`: of that registered model."""

    time: float
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    finish_reason: str
    temperature: float
    seed: int
    settings: dict[str, Any]
    accepted: tuple[int, ...]
    base: str
    heads: str
    version: int | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def from_the_base(self) -> bool:
        """Whether the base's own distribution gave the answer, by its argmax or by a draw, as `distill` makes answers itself.
        Penalties, top-p and the like, and typical acceptance, give others, and so does a hook that changes tokens."""
        return not self.settings.keys() & {*NEUTRAL, "redacted"} and self.settings.get("speculative") != "lossy-typical"


def check_record(values: Any) -> ServedRecord:
    """The record that `values` are. Raises ValueError, which names the field, for anything else."""
    if not isinstance(values, dict):
        raise ValueError("is no JSON object")
    known = {one.name for one in fields(ServedRecord)}
    if missing := sorted(known - {"version"} - values.keys()):
        raise ValueError(f"{missing[0]}: is missing")
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{unknown[0]}: is no field of a record")
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version: {values['schema_version']!r} is not {SCHEMA_VERSION}")
    for name in ("prompt_ids", "response_ids", "accepted"):
        if not isinstance(values[name], list | tuple) or not all(type(one) is int and one >= 0 for one in values[name]):
            raise ValueError(f"{name}: is no list of whole numbers")
    for name, kinds in (("time", (int, float)), ("temperature", (int, float)), ("seed", int), ("base", str), ("heads", str),
                        ("finish_reason", str), ("settings", dict)):
        if not isinstance(values[name], kinds):  # type: ignore[arg-type]
            raise ValueError(f"{name}: {values[name]!r} is of another type")
    if not values["prompt_ids"] or not values["response_ids"]:
        raise ValueError("prompt_ids or response_ids: is empty")
    lists = {name: tuple(values[name]) for name in ("prompt_ids", "response_ids", "accepted")}
    return ServedRecord(**{**values, **lists})


def write_records(folder: Path, records: Sequence[ServedRecord], now: float, writer: str) -> Path:
    """Write one part; returns its path. `now`: Unix seconds; `writer`: letters and digits that tell writers apart."""
    lines = [json.dumps(asdict(record), separators=(",", ":")) for record in records]
    path = folder / f"part-{int(now * 1000):013d}-{writer}-{content_id(lines)[:8]}.jsonl"
    with atomic_file(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def record_parts(folder: Path) -> list[tuple[Path, int]]:
    """The parts of a folder with their sizes in bytes, the oldest first; none where there is no folder."""
    if is_remote(folder):
        found = [(folder / name, about.bytes) for name, about in listing(folder).items() if "/" not in name]
    else:
        found = [(path, path.stat().st_size) for path in folder.glob("part-*.jsonl")] if folder.exists() else []
    return sorted((one for one in found if _PART.fullmatch(one[0].name)), key=lambda one: one[0].name)


def prune(folder: Path, max_bytes: int, oldest: float) -> int:
    """Remove the oldest parts until the rest has at most `max_bytes`, and every part from before `oldest` (Unix seconds); returns
    how many. Several writers may do so at once."""
    parts = record_parts(folder)
    total, removed = sum(size for _, size in parts), 0
    for path, size in parts:
        found = _PART.fullmatch(path.name)
        assert found is not None
        if total <= max_bytes and int(found[1]) >= oldest * 1000:
            break
        remove_file(path)
        total, removed = total - size, removed + 1
    return removed


def read_records(path: Path) -> Iterator[ServedRecord | RowError]:
    """The records of one part, and a `RowError` for each line that is none: the last one of a part that was cut off."""
    with open_stream(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield check_record(json.loads(line))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                whole = line.endswith(b"\n")
                why = str(error) if whole else "is cut off"
                yield RowError(number, f"{name_in(path, path.parent)}: row {number}: {why}")
