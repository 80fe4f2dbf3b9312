"""Feature shards read back: contents, order, shares, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hydra_core.base import Base
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadsConfig, build_drafter
from hydra_core.training.model import HeadTraining
from hydra_core.training.packing import FeatureRow
from pipelines.rows.batch_order import BatchOrder
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.packed_reader import LEAST_PROMPT, ROW_TOKENS, ProcessGroup, RowReader, cropped
from pipelines.train.batches import StepBatches, valid_counts, validation_groups
from tests.pipelines.synthetic import feature_row, write_shard


@pytest.fixture(scope="module")
def rows(tiny_base: Base) -> list[dict[str, Any]]:
    return [feature_row(tiny_base, n, "held_out" if n % 5 == 0 else "train") for n in range(30)]


@pytest.fixture(scope="module")
def folder(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    write_shard(folder / "a.parquet", rows[:13], row_group_size=4)
    write_shard(folder / "b.parquet", rows[13:], row_group_size=50)
    return folder


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("cache_bytes", [1, 1 << 30])
def test_rows_come_back_as_written(rows: list[dict[str, Any]], folder: Path, split: str, cache_bytes: int) -> None:
    store = FeatureStore.open(folder, split, cache_bytes=cache_bytes)
    wanted = [row for row in rows if row["split"] == split]
    assert store.index.ids == tuple(row["id"] for row in wanted)
    for number in reversed(range(len(store))):
        got, row = store.read(number), wanted[number]
        assert got.token_ids.tolist() == row["prompt_ids"] + row["response_ids"]
        assert got.prompt_tokens == len(row["prompt_ids"]) and got.hidden.dtype == torch.bfloat16
        assert got.hidden.contiguous().view(torch.uint8).numpy().tobytes() == row["hidden"]
    counts = store.response_counts(288)
    answered = [token for row in wanted for token in row["response_ids"]]
    assert counts.tolist() == np.bincount(answered, minlength=288).tolist()


def test_the_cache_keeps_to_its_budget(folder: Path) -> None:
    store = FeatureStore.open(folder, "train", cache_bytes=20_000)
    for number in range(len(store)):
        store.read(number)
    assert store._held == sum(column.nbytes for column in store._cache.values())
    assert len(store._cache) == 1 or store._held <= 20_000


def test_sample_prefers_greedy_rows(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    mixed = [row | {"temperature": float(n % 2)} for n, row in enumerate(rows)]
    write_shard(tmp_path / "a.parquet", mixed)
    store = FeatureStore.open(tmp_path, "train")
    chosen = store.sample(1000, seed=1)
    assert set(chosen) == set(np.flatnonzero(store.index.temperature == 0)) and len(chosen) < len(store)
    assert store.sample(3, seed=1).tolist() == chosen[:3].tolist()


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_tokens": 3}, "hidden_tokens 3 is not"),
    ({"hidden_layer": "first"}, "hidden_layer 'first'"),
    ({"base": "other@0:bf16"}, "different bases"),
])
def test_a_wrong_row_is_named(rows: list[dict[str, Any]], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    bad = [row | {"split": "train"} for row in rows]
    bad[7] = bad[7] | change
    write_shard(tmp_path / "a.parquet", bad)
    with pytest.raises(InputError, match=message) as raised:
        FeatureStore.open(tmp_path, "train")
    assert bad[7]["id"] in str(raised.value)


def test_truncated_hidden_states_are_named(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [rows[1] | {"hidden": rows[1]["hidden"][:-2]}])
    with pytest.raises(InputError, match=f"row {rows[1]['id']}: hidden holds"):
        FeatureStore.open(tmp_path, "train").read(0)


def test_wrong_folders_are_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no feature shards"):
        FeatureStore.open(tmp_path, "train")
    write_shard(tmp_path / "a.parquet", [row for row in rows if row["split"] == "train"])
    with pytest.raises(InputError, match="no rows of the split 'held_out'"):
        FeatureStore.open(tmp_path, "held_out")
    with pytest.raises(InputError, match="outside the base's vocabulary of 10"):
        FeatureStore.open(tmp_path, "train").response_counts(10)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match=r"b\.parquet: is not a readable Parquet file"):
        FeatureStore.open(tmp_path, "train")
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet: schema version none"):
        FeatureStore.open(tmp_path, "train")


def test_rows_in_memory_are_read_before_others_are_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a block whose rows were all read is the first to go."""
    store = FeatureStore.open(folder, "train", cache_bytes=20_000)
    blocks = store.index.block.tolist()
    store.read(0)
    loaded: list[int] = []
    read = store._hidden
    monkeypatch.setattr(store, "_hidden", lambda block: (loaded.append(block), read(block))[1])
    wanted = [len(store) - 1, 1, 0]
    found = store.read_rows(wanted)
    assert loaded == [blocks[0], blocks[0], blocks[-1]]
    assert [row.token_ids.tolist() for row in found] == [store.token_ids(row).tolist() for row in wanted]
    roomy = FeatureStore.open(folder, "train")
    for row in [*range(4), *np.flatnonzero(store.index.block == blocks[0])]:
        roomy.read(int(row))
    assert len(roomy._cache) > 1 and next(iter(roomy._cache)) == blocks[0]


def test_validation_gives_every_rank_as_many_batches(folder: Path) -> None:
    store = FeatureStore.open(folder, "held_out")
    for wanted in (1, 2, 3, 5, 99):
        groups = [validation_groups(store, wanted, 2, 0, ProcessGroup(rank, 2)) for rank in range(2)]
        assert len(groups[0]) == len(groups[1]) > 0
        counted = [int(row) for share in groups for rows, counts in share if counts for row in rows]
        assert sorted(counted) == sorted(store.sample(wanted, 0).tolist())


@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_gradients_do_not_depend_on_ranks_and_pieces(tiny_base: Base, folder: Path, kind: str) -> None:
    """The mean over ranks and pieces of what each back-propagates is the whole step's gradient, for either loss."""
    store = FeatureStore.open(folder, "train")
    heads = HeadsConfig(kind=kind)  # type: ignore[arg-type]
    vocab = DraftVocab.rank(store.response_counts(288), 40, tiny_base.stop_ids)
    torch.manual_seed(0)
    model = HeadTraining(build_drafter(heads, tiny_base.vocabulary, vocab), tiny_base.vocabulary)
    counts = valid_counts(store, vocab, heads)
    if kind == "hydra":
        assert (counts < valid_counts(store, vocab, HeadsConfig(kind="hydra++"))).any()  # some cannot be drafted

    def gradients(world: int, accumulate: int, lanes: int) -> list[torch.Tensor]:
        parts, totals = world * accumulate, [torch.zeros_like(parameter) for parameter in model.parameters()]
        for rank in range(world):
            order = BatchOrder.of(store, 8, 3, lanes=lanes)
            batches = StepBatches(RowReader(store), order, counts, ProcessGroup(rank, world), accumulate)
            batch = batches.batch(2)
            assert len(batch.pieces) == accumulate  # as many exchanges as the other ranks have
            for number, piece in enumerate(batch.pieces):
                divisors = batch.counts / parts
                loss, _ = model(piece, divisors if number < batch.counted else torch.full_like(divisors, torch.inf))
                found = torch.autograd.grad(loss, list(model.parameters()))
                totals = [total + part / parts for total, part in zip(totals, found, strict=True)]
        return totals

    for lanes, parts in ((1, ((4, 1), (1, 4), (2, 2), (3, 1), (5, 2))), (4, ((4, 1), (3, 1), (2, 2), (3, 3), (9, 1)))):
        whole = gradients(1, 1, lanes)
        for world, accumulate in parts:
            for one, parted in zip(whole, gradients(world, accumulate, lanes), strict=True):
                torch.testing.assert_close(one, parted, rtol=1e-4, atol=1e-6)


def test_long_prompts_lose_their_beginning() -> None:
    """Attention over a line costs its square; every answer stays whole, with something before it."""
    def row(prompt: int, answer: int) -> FeatureRow:
        ids = torch.arange(prompt + answer)
        return FeatureRow(ids, prompt, ids[:, None].float(), ids.float())

    for prompt, answer, kept in ((ROW_TOKENS - 5, 5, ROW_TOKENS - 5), (5000, 200, ROW_TOKENS - 200), (300, 3000, LEAST_PROMPT),
                                 (10, 3000, 10)):
        found = cropped(row(prompt, answer))
        assert found.prompt_tokens == kept and len(found.token_ids) == kept + answer
        first = prompt - kept
        assert int(found.token_ids[0]) == int(found.hidden[0, 0]) == first
        assert found.log_partitions is not None and int(found.log_partitions[0]) == first
