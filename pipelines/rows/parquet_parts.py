"""Part files: Parquet files of rows, written so that a kill loses at most the rows in flight.

A part appears whole or not at all (`atomic_file`). Its name is a digest of the ids in it, so that writing the same rows
again replaces the part. A resumed run reads the id column and skips the rows that are there. What goes over all parts reads one
at a time, and keeps 16 bytes of each row's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hydra_core.errors import InputError
from hydra_core.storage import is_remote, opened
from pipelines.rows.row_ids import among, content_id_of, is_content_id, merged, repeated, row_digests
from pipelines.rows.schemas import check_schema, content_id
from pipelines.runtime.files import atomic_file, remove_file

ROW_GROUP_BYTES = 16 << 20  # the unit in which training reads rows, and deals them to its workers


def write_part(folder: Path, rows: list[dict[str, Any]], contract: pa.Schema, key: str = "id",
               names: list[str] | None = None) -> Path:
    """Write `rows` as one Parquet part of `contract`; returns its path. `names`: what tells the rows apart, where `key` does
    not."""
    return write_table(folder, pa.Table.from_pylist(rows, schema=contract), names or [row[key] for row in rows])


def write_table(folder: Path, table: pa.Table, names: list[str]) -> Path:
    """Write a table of a contract as one part; `names`: what tells its rows apart."""
    path = folder / f"part-{content_id(sorted(names))}.parquet"
    per_row = max(1, table.nbytes // max(1, len(table)))
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, row_group_size=max(1, ROW_GROUP_BYTES // per_row))
    return path


def part_files(folder: Path) -> list[Path]:
    """Finished parts of a folder, sorted by name."""
    return sorted(folder.glob("part-*.parquet")) if folder.exists() else []


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers left behind, those of earlier versions (`.tmp`) too. An object store has
    none."""
    for pattern in (".part-*.part", ".part-*.tmp") if not is_remote(folder) else ():
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def deduplicate(folder: Path, contract: pa.Schema, key: str = "id") -> int:
    """Keep each row once where a killed job's workers have written rows that the job after it wrote too, in other parts; returns
    how many rows were removed. A kill in between leaves a row twice, never none of it. Reads the ids alone unless a row stands
    twice."""
    twice = repeated(_digests(folder, contract, key))
    seen: set[bytes] = set()
    removed, written = 0, set[Path]()
    for path, ids in iter_parts(folder, contract, [key]) if len(twice) else ():
        if path in written:  # a part is named after its rows: the rest of an earlier part has this name now
            continue
        digests = row_digests(ids[key].to_pylist())
        keep = []
        for digest, doubtful in zip(digests.tolist(), among(digests, twice), strict=True):
            keep.append(digest not in seen)
            seen.update([digest] if doubtful else [])
        if all(keep):
            continue
        if any(keep):
            rows = _read(path, contract, contract.names).filter(pa.array(keep))
            written.add(write_table(folder, rows, rows[key].to_pylist()))
        if path not in written:
            remove_file(path)
        removed += keep.count(False)
    return removed


def read_parts(folder: Path, contract: pa.Schema, columns: Iterable[str] | None = None) -> pa.Table:
    """All rows of a folder. Raises InputError for a part of another schema or one that cannot be read."""
    wanted = list(columns) if columns is not None else contract.names
    tables = [table for _, table in iter_parts(folder, contract, wanted)]
    empty = pa.schema([contract.field(name) for name in wanted]).empty_table()
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]) if tables else empty


def iter_parts(folder: Path, contract: pa.Schema, columns: Iterable[str]) -> Iterator[tuple[Path, pa.Table]]:
    """Each part that stands now, and these columns of it. Raises InputError as `read_parts`."""
    wanted = list(columns)
    return ((path, _read(path, contract, wanted)) for path in part_files(folder))


def iter_rows(path: Path, contract: pa.Schema, size: int) -> Iterator[pa.Table]:
    """The rows of one part, at most `size` at a time. Raises InputError as `read_parts`."""
    _metadata(path, contract)
    with _readable(path), pq.ParquetFile(opened(path)) as file:
        for batch in file.iter_batches(size, columns=contract.names):
            yield pa.Table.from_batches([batch])


def number_of_rows(folder: Path, contract: pa.Schema) -> int:
    """Rows in finished parts, by their metadata. Raises InputError as `read_parts`."""
    return sum(_metadata(path, contract).num_rows for path in part_files(folder))


def stored_ids(folder: Path, contract: pa.Schema, key: str = "id") -> np.ndarray:
    """Digests of the ids in finished parts (`row_ids`): [n] of 16 bytes, sorted, each once."""
    return merged(_digests(folder, contract, key))


def digest_of_ids(folder: Path, contract: pa.Schema, *parts: Any, key: str = "id") -> str:
    """`content_id(*parts, ids)` of the sorted ids in finished parts, without a list of them."""
    if all(is_content_id(name) for _, ids in iter_parts(folder, contract, [key]) for name in ids[key].to_pylist()):
        return content_id_of(stored_ids(folder, contract, key), *parts)
    return content_id(*parts, sorted(set(read_parts(folder, contract, [key])[key].to_pylist())))  # rows of somebody else


def _digests(folder: Path, contract: pa.Schema, key: str) -> np.ndarray:
    found = [row_digests(ids[key].to_pylist()) for _, ids in iter_parts(folder, contract, [key])]
    return np.concatenate([row_digests(()), *found])


def _read(path: Path, contract: pa.Schema, columns: list[str]) -> pa.Table:
    _metadata(path, contract)
    with _readable(path):
        return pq.read_table(opened(path), columns=columns)


def _metadata(path: Path, contract: pa.Schema) -> pq.FileMetaData:
    with _readable(path):
        metadata = pq.read_metadata(opened(path))
        check_schema(metadata.schema.to_arrow_schema(), contract, str(path))
        return metadata


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}): delete it and run again") from None
