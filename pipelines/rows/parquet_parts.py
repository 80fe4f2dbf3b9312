"""Part files: Parquet files of rows, written so that a kill loses at most the rows in flight.

A part is written under a temporary name and then renamed. Its name is a digest of the ids in it, so that writing the same rows
again replaces the part. A resumed run reads the id column and skips the rows that are there. Ray Data has a resume by rows
too, but for plans that begin with a file read and end in a write; for other plans it turns itself off with a warning.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hydra_core.errors import InputError
from pipelines.rows.schemas import check_schema, content_id
from pipelines.runtime.files import atomic_file

ROW_GROUP_BYTES = 64 << 20


def write_part(folder: Path, rows: list[dict[str, Any]], contract: pa.Schema, key: str = "id",
               names: list[str] | None = None) -> Path:
    """Write `rows` as one Parquet part of `contract`; returns its path. `names`: what tells the rows apart, where `key` does
    not."""
    table = pa.Table.from_pylist(rows, schema=contract)
    return _write(folder, table, names or [row[key] for row in rows])


def _write(folder: Path, table: pa.Table, names: list[str]) -> Path:
    path = folder / f"part-{content_id(sorted(names))}.parquet"
    per_row = max(1, table.nbytes // max(1, len(table)))
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=max(1, ROW_GROUP_BYTES // per_row))
    return path


def part_files(folder: Path) -> list[Path]:
    """Finished parts of a folder, sorted by name."""
    return sorted(folder.glob("part-*.parquet")) if folder.exists() else []


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers left behind, those of earlier versions (`.tmp`) too."""
    for pattern in (".part-*.part", ".part-*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def deduplicate(folder: Path, contract: pa.Schema, key: str = "id") -> int:
    """Keep each row once where a killed job's workers have written rows that the job after it wrote too, in other parts; returns
    how many rows were removed. A kill in between leaves a row twice, never none of it."""
    seen: set[str] = set()
    removed, written = 0, set[Path]()
    for path in part_files(folder):
        ids = _read(path, contract, [key])[key].to_pylist()
        keep = [row_id not in seen for row_id in ids]
        if path in written or all(keep):
            seen.update(ids)
            continue
        if any(keep):
            rows = _read(path, contract, contract.names).filter(pa.array(keep))
            written.add(_write(folder, rows, rows[key].to_pylist()))
        seen.update(ids)
        path.unlink()
        removed += keep.count(False)
    return removed


def read_parts(folder: Path, contract: pa.Schema, columns: Iterable[str] | None = None) -> pa.Table:
    """All rows of a folder. Raises InputError for a part of another schema or one that cannot be read."""
    wanted = list(columns) if columns is not None else contract.names
    tables = [_read(path, contract, wanted) for path in part_files(folder)]
    empty = pa.schema([contract.field(name) for name in wanted]).empty_table()
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]) if tables else empty


def finished_ids(folder: Path, contract: pa.Schema, key: str = "id") -> set[str]:
    """Ids of the rows in finished parts."""
    return set(read_parts(folder, contract, [key])[key].to_pylist())


def _read(path: Path, contract: pa.Schema, columns: list[str]) -> pa.Table:
    try:
        check_schema(pq.read_schema(path), contract, str(path))
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}): delete it and run again") from None
