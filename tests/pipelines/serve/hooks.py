"""Redaction hooks as users write them."""

from __future__ import annotations

from typing import Any

NO_FUNCTION = 3


def as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    assert isinstance(row["prompt_text"], str) and isinstance(row["response_text"], str)
    return row


def without_ones(row: dict[str, Any]) -> dict[str, Any] | None:
    """Drops records whose prompt has a 5, and takes every 7 out of answers."""
    if 5 in row["prompt_ids"]:
        return None
    return row | {"response_ids": [token for token in row["response_ids"] if token != 7]}


def raises(row: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(f"cannot read {row['prompt_text']}")


def something_else(row: dict[str, Any]) -> Any:
    return "done"
