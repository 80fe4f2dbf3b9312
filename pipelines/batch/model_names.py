"""Which models the rows of an OpenAI Batch file name, looked at before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hydra_core.errors import InputError
from pipelines.batch.reader import BatchRow, input_kind, read_rows
from pipelines.config import RunConfig

SAMPLE = 1000
"""Rows that are looked at first; only where too many of them name another model is the whole file read."""


def check_model_names(config: RunConfig, served: Sequence[str]) -> None:
    """Raise InputError when a larger share of the rows than `batch.max_error_share` asks for models that are not `served`. A
    smaller one becomes error rows."""
    if input_kind(config.batch) != "openai":
        return
    rows, others = 0, Counter[str]()
    for row in read_rows(config):
        rows += 1
        name = (row.body or {}).get("model") if isinstance(row, BatchRow) else None
        if name is not None and name not in served:
            others[str(name)[:80]] += 1
        if rows == SAMPLE and others.total() <= config.batch.max_error_share * rows:
            return
    if others.total() > config.batch.max_error_share * rows:
        most = others.most_common(1)[0][0]
        way = f"set serve.app_name={most}, or change them" if config.batch.address is None else (
            f"change them, or set serve.app_name and batch.address to where {most!r} is served")
        raise InputError(f"batch.input={config.batch.source}: {others.total()} of its {rows} rows ask for another model "
                         f"({', '.join(repr(name) for name, _ in others.most_common(3))}) than {', '.join(map(repr, served))}, "
                         f"which is served: {way}")
