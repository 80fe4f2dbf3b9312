"""Ids as 16 bytes each: what they tell is what lists of ids told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rows.parquet_parts import digest_of_ids, iter_rows, number_of_rows, part_files, stored_ids, write_part
from pipelines.rows.row_ids import among, content_id_of, merged, repeated, row_digests
from pipelines.rows.schemas import ERRORS, PROMPTS, content_id

IDS = st.one_of(st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"), st.integers(0, 9).map(lambda n: f"{n:02d}" * 16),
                st.integers(0, 255).map(lambda number: f"{number:02x}" + "00" * 15), st.text(max_size=33))


def rows(*ids: str) -> list[dict[str, str]]:
    return [{"id": name, "stage": "s", "message": f"of {name}"} for name in ids]


@given(st.lists(IDS), st.lists(IDS))
def test_which_ids_are_known(asked: list[str], known: list[str]) -> None:
    digests = row_digests(known)
    assert among(row_digests(asked), merged(digests)).tolist() == [name in set(known) for name in asked]
    assert len(merged(digests, digests)) == len(set(known))
    assert set(repeated(digests).tolist()) == {row_digests([name])[0] for name in known if known.count(name) > 1}


@given(st.lists(IDS.filter(lambda name: len(name) == 32 and set(name) <= set("0123456789abcdef"))))
def test_their_digest_is_that_of_the_sorted_list(ids: list[str]) -> None:
    """What training and the tracker have recorded of earlier runs stays valid."""
    digests = merged(row_digests(ids))
    assert content_id_of(digests, "fingerprint", 1) == content_id("fingerprint", 1, sorted(set(ids)))
    assert content_id_of(digests) == content_id(sorted(set(ids)))


@pytest.mark.parametrize("name", ["row {}", "{:032x}"])
def test_what_parts_tell(tmp_path: Path, name: str) -> None:
    """Rows of somebody else, whose ids are any text, too."""
    ids = [name.format(number * 7919) for number in range(40)]
    write_part(tmp_path, rows(*ids[:30]), ERRORS)
    write_part(tmp_path, rows(*ids[20:]), ERRORS)
    assert digest_of_ids(tmp_path, ERRORS, "f") == content_id("f", sorted(ids)) and number_of_rows(tmp_path, ERRORS) == 50
    assert np.array_equal(stored_ids(tmp_path, ERRORS), merged(row_digests(ids)))
    tables = list(iter_rows(part_files(tmp_path)[0], ERRORS, 8))
    assert max(map(len, tables)) == 8 and {len(table) for table in tables[:-1]} == {8}
    assert [row["message"] for table in tables for row in table.to_pylist()] == [
        f"of {row['id']}" for table in tables for row in table.to_pylist()]
    with pytest.raises(Exception, match="column prompt_id is missing"):
        number_of_rows(tmp_path, PROMPTS)
