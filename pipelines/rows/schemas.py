"""Schemas of the rows between stages: names, Arrow types and ids, checked by the writer and by the reader.

prompt row -> response row -> feature row, and error rows from any of them. Rows hold token ids, and no text is tokenised
again: differences in the template or at the end of a turn would lower acceptance without an error.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from hydra_core.errors import InputError

SCHEMA_VERSION = 1
_META = {b"hydra_heads_schema": str(SCHEMA_VERSION).encode()}

PROMPTS = pa.schema([
    ("prompt_id", pa.string()),          # content hash
    ("messages", pa.string()),           # JSON list of {role, content}, or null for a raw prompt
    ("prompt", pa.string()),             # raw text, or null for a chat
    ("prompt_ids", pa.list_(pa.int32())),  # template applied, ready to decode
    ("source", pa.string()),
    ("split", pa.string()),              # train | held_out, a function of prompt_id
], metadata=_META)

RESPONSES = pa.schema([
    ("id", pa.string()),
    ("prompt_id", pa.string()),
    ("prompt_ids", pa.list_(pa.int32())),
    ("response_ids", pa.list_(pa.int32())),
    ("finish_reason", pa.string()),
    ("temperature", pa.float32()),
    ("seed", pa.int64()),
    ("source", pa.string()),
    ("split", pa.string()),
    ("base", pa.string()),               # identity: name@digest:weight format
], metadata=_META)

FEATURES = pa.schema([
    *RESPONSES,
    ("hidden", pa.large_binary()),       # raw little-endian values of [T, D], T = prompt + response tokens
    ("hidden_dtype", pa.string()),       # bf16 | fp32
    ("hidden_tokens", pa.int32()),       # T
    ("hidden_width", pa.int32()),        # D
    ("hidden_layer", pa.string()),       # last: after the base's final norm
], metadata=_META)

ERRORS = pa.schema([("id", pa.string()), ("stage", pa.string()), ("message", pa.string())], metadata=_META)


def content_id(*parts: Any) -> str:
    """Stable 128-bit digest of JSON-able parts, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def split_of(prompt_id: str, held_out: float) -> str:
    """`held_out` for about that share of prompts, else `train`. The prompt's id alone decides."""
    return "held_out" if is_in_share(prompt_id, held_out) else "train"


def is_in_share(row_id: str, share: float) -> bool:
    """Whether a row belongs to about that share of all rows. A larger share contains every smaller one."""
    return share >= 1 or int(row_id[:8], 16) / 0x1_0000_0000 < share  # at 1 ids need not be hexadecimal


def check_schema(schema: pa.Schema, contract: pa.Schema, where: str) -> None:
    """Raise InputError unless `schema` has the columns, types and version of `contract`."""
    version = (schema.metadata or {}).get(b"hydra_heads_schema", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise InputError(f"{where}: schema version {version} is not {SCHEMA_VERSION}: make it again with this version")
    for field in contract:
        index = schema.get_field_index(field.name)
        if index < 0:
            raise InputError(f"{where}: column {field.name} is missing")
        if schema.field(index).type != field.type:
            raise InputError(f"{where}: column {field.name} is {schema.field(index).type}, not {field.type}")


def check_counts(stage: str, total: int, ok: int, errors: int, skipped: int, max_error_share: float,
                 hint: str = "see the errors file") -> None:
    """Raise RuntimeError when rows were lost, InputError when too many failed; `hint` says where to look."""
    if ok + errors + skipped != total:
        raise RuntimeError(f"{stage}: {ok} ok + {errors} errors + {skipped} skipped is not {total} rows read")
    if total and errors / total > max_error_share:
        raise InputError(f"{stage}: {errors} of {total} rows failed, over the allowed share {max_error_share}: {hint}")
