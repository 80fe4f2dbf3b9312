"""Which rows a step has, which of them a rank takes, and what a rank reads for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hydra_core.base import VocabHead
from hydra_core.training.losses import log_partition
from pipelines.rows import packed_reader
from pipelines.rows.batch_order import BatchOrder, lanes_for, share_of
from pipelines.rows.feature_store import FeatureStore
from pipelines.rows.online_features import OnlineStore
from pipelines.rows.packed_reader import ProcessGroup, RowReader
from tests.pipelines.synthetic import write_shard

LARGE = 1 << 40
BLOCKS, PER_BLOCK, PER_STEP, WIDTH = 96, 8, 16, 16


def order(rows: int, blocks: int, per_step: int, window: int = LARGE, seed: int = 0, lanes: int = 1) -> BatchOrder:
    lengths = 10 + np.arange(rows) % 7
    return BatchOrder(np.arange(rows) * blocks // rows, np.full(blocks, 100), lengths, per_step, seed, lanes, window)


def uneven(per_step: int, lanes: int, seed: int = 0) -> BatchOrder:
    """Blocks of 1 to 60 rows with rows of 5 to 400 tokens; each is as large as its tokens."""
    random = np.random.default_rng(seed)
    block = np.repeat(np.arange(40), random.integers(1, 60, 40))
    lengths = np.clip(random.lognormal(4, 1, len(block)), 5, 400).astype(np.int64)
    sizes = np.bincount(block, lengths).astype(np.int64)
    return BatchOrder(block, sizes, lengths, per_step, seed, lanes, int(sizes.max()) * lanes)


@pytest.mark.parametrize(("window", "lanes"), [(50, 1), (250, 1), (LARGE, 1), (250, 2), (450, 4), (50, 4)])
def test_every_epoch_has_every_row_once(window: int, lanes: int) -> None:
    plan = order(23, 5, 4, window, lanes=lanes)
    seen = np.concatenate([plan.rows(step) for step in range(23)])  # 23 steps x 4 rows = 4 epochs
    epochs = seen.reshape(4, 23)
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert np.array_equal(plan.rows(9), order(23, 5, 4, window, lanes=lanes).rows(9))  # nothing but (seed, step) decides
    assert not np.array_equal(seen[:23], np.concatenate([order(23, 5, 23, window, seed=1).rows(0)]))
    assert plan.total_steps(2.0) == 12 and plan.total_steps(0.01) == 1


@pytest.mark.parametrize("per_step", [1, 7, 16, 20, 64, 5000])
@pytest.mark.parametrize("lanes", [2, 5, 16])
def test_so_has_an_epoch_of_uneven_blocks(per_step: int, lanes: int) -> None:
    """Also one that is shorter than a step, and with more lanes than a step has rows."""
    plan = uneven(per_step, lanes)
    rows, epochs = len(plan.block), 3
    seen = np.concatenate([plan.rows(step) for step in range(-(-epochs * rows // per_step))])[:epochs * rows]
    assert all(sorted(epoch) == list(range(rows)) for epoch in seen.reshape(epochs, rows))


def test_a_window_bounds_the_blocks_in_use() -> None:
    plan = order(100, 10, 100, window=200)
    blocks = plan.block[plan.rows(0)]
    assert all(len(set(blocks[start:start + 20])) == 2 for start in range(0, 100, 20))
    plan = order(100, 10, 20, window=200, lanes=2)
    assert all(len(set(plan.block[plan.rows(step)])) == 2 for step in range(5))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_the_window_bounds_the_blocks_of_all_lanes_together(lanes: int) -> None:
    """Bytes of the blocks that have been begun and are not finished, at each step of an epoch."""
    plan = uneven(16, lanes)
    steps = len(plan.block) // 16
    used = [set(plan.block[plan.rows(step)].tolist()) for step in range(steps)]
    for step in range(1, steps):
        under_way = set().union(*used[:step]) & set().union(*used[step:])
        assert sum(plan.block_bytes[list(under_way)]) <= plan.window_bytes


def test_shares_part_a_step_evenly() -> None:
    lengths = np.array([50, 3, 40, 8, 30, 9, 20, 10])
    rows = np.arange(8)
    shares = [share_of(rows, lengths, rank, 2) for rank in range(2)]
    assert sorted(np.concatenate(shares)) == list(rows) and {len(share) for share in shares} == {4}
    assert abs(int(lengths[shares[0]].sum()) - int(lengths[shares[1]].sum())) <= 10


@pytest.mark.parametrize("lanes", [1, 4, 6, 16])
@pytest.mark.parametrize(("world", "pieces"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 1), (5, 3), (8, 2), (16, 1)])
def test_ranks_and_pieces_part_the_same_rows(lanes: int, world: int, pieces: int) -> None:
    """Whatever their number: a run may go on with another. None of them is without work, at the end of an epoch neither."""
    plan = uneven(16, lanes)
    last = len(plan.block) // 16
    for step in (0, 1, last - 1, last, last + 1, 2 * last):
        found = [piece for rank in range(world) for piece in plan.pieces(step, ProcessGroup(rank, world), pieces)]
        assert sorted(np.concatenate(found)) == sorted(plan.rows(step)) and len(found) == world * pieces
        assert min(map(len, found)) >= 1 and max(map(len, found)) - min(map(len, found)) <= 1


def test_a_resumed_order_goes_on_where_it_was() -> None:
    plan, epoch = uneven(16, 8), len(uneven(16, 8).block) // 16
    gone = [plan.rows(step).tolist() for step in range(3 * epoch)]
    for step in (1, epoch, 2 * epoch + 3):
        later = uneven(16, 8)
        assert [later.rows(at).tolist() for at in range(step, 3 * epoch)] == gone[step:]


def test_a_run_of_an_earlier_version_goes_on_in_its_order() -> None:
    """That version dealt the rows of windows by length; `lanes` is missing in its checkpoints, which is read as one lane."""
    plan = order(23, 5, 4, window=250, seed=3)
    assert [plan.rows(step).tolist() for step in range(6)] == [
        [20, 13, 21, 10], [11, 19, 12, 22], [8, 14, 16, 15], [7, 5, 9, 18], [6, 17, 2, 1], [4, 3, 0, 8]]


def test_lanes_fit_the_window_and_the_world_sizes() -> None:
    blocks = np.full(100, 64)
    assert lanes_for(blocks, 16, 6400) == 1  # all fit: one shuffle
    assert [lanes_for(blocks, per_step, 512) for per_step in (1, 2, 13, 16, 20, 24, 512)] == [1, 2, 8, 8, 5, 8, 8]
    assert [lanes_for(blocks, 16, 64 * most) for most in (0, 1, 3, 7, 15, 99)] == [1, 1, 2, 4, 8, 16]
    assert lanes_for(np.array([10, 500, 3]), 16, 512) == 1  # one of them nearly fills the window


def test_a_row_may_come_at_any_step_of_its_window() -> None:
    """The lengths that steps share leave every row every place: over many epochs a row is as often early as late."""
    plan = uneven(16, 4)
    place = np.empty(len(plan.block))
    early = np.zeros(len(plan.block))
    for epoch in range(60):
        place[plan._epoch(epoch)] = np.arange(len(plan.block))
        early += place < len(plan.block) / 2
    assert early.min() > 10 and early.max() < 50
    short = plan.lengths < np.median(plan.lengths)
    assert abs(early[short].mean() - early[~short].mean()) < 1


@pytest.mark.parametrize(("per_step", "world", "most"), [(16, 2, 1.06), (16, 4, 1.14), (64, 4, 1.10), (64, 8, 1.20)])
def test_ranks_have_about_as_many_tokens(per_step: int, world: int, most: float) -> None:
    """The largest share of a step's tokens, in the mean over steps and relative to an equal one.

    Dealt at random it is 1.10, 1.28, 1.14 and 1.29, by length 1.03, 1.10, 1.03 and 1.08. Steps differ less than random ones in
    their tokens.
    """
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 0.5, 8000), 20, 1024).astype(np.int64)
    block = np.arange(8000) // 20
    plan = BatchOrder(block, np.full(400, 100), lengths, per_step, 0, 8, 800)
    tokens = np.array([[lengths[plan.pieces(step, ProcessGroup(rank, world), 1)[0]].sum() for rank in range(world)]
                       for step in range(8000 // per_step)])
    found = np.mean(tokens.max(1) / tokens.mean(1))
    print(f"{per_step} rows, {world} ranks: {found:.3f}")
    assert found < most
    by_chance = lengths[random.permutation(8000)].reshape(-1, per_step).sum(1)
    assert tokens.sum(1).std() < by_chance.std()


@pytest.fixture(scope="module")
def many_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small rows in many row groups, over four files."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("many")
    for part in range(4):
        rows = []
        for number in range(BLOCKS * PER_BLOCK // 4):
            tokens = int(random.integers(20, 60))
            hidden = torch.from_numpy(random.standard_normal((tokens, WIDTH))).bfloat16().view(torch.uint8).numpy()
            rows.append({"id": f"{part}-{number}", "prompt_id": "p", "prompt_ids": [1] * 5, "response_ids": [2] * (tokens - 5),
                         "finish_reason": "stop", "temperature": 0.0, "seed": 0, "source": "test", "split": "train",
                         "base": "b@0:bf16", "hidden": hidden.tobytes(), "hidden_dtype": "bf16",
                         "hidden_tokens": tokens, "hidden_width": WIDTH, "hidden_layer": "last"})
        write_shard(folder / f"part-{part}.parquet", rows, row_group_size=PER_BLOCK)
    return folder


class CountedStore:
    """A store that counts the tokens whose hidden states it reads."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, blocks: int = 20) -> None:
        self.store, self.tokens = FeatureStore.open(folder, "train"), 0
        self.store._budget = self.window = blocks * max(block.bytes for block in self.store.blocks)
        tokens, read = np.bincount(self.store.index.block, self.store.index.lengths), self.store._hidden

        def counted(block: int) -> object:
            self.tokens += 0 if block in self.store._cache else int(tokens[block])
            return read(block)

        monkeypatch.setattr(self.store, "_hidden", counted)

    @property
    def share(self) -> float:
        """What was read, relative to the whole."""
        return self.tokens / int(self.store.index.lengths.sum())

    def epochs(self, rank: int, world: int, lanes: int | None, pieces: int = 1, epochs: int = 1) -> float:
        """The share that a rank reads in an epoch, in the mean over epochs; 1 is each block once."""
        plan = BatchOrder.of(self.store, PER_STEP, 0, self.window, lanes)
        assert lanes is not None or plan.lanes == 16
        for step in range(plan.total_steps(epochs)):
            for rows in plan.pieces(step, ProcessGroup(rank, world), pieces):
                self.store.read_rows(rows)
        return self.share / epochs


@pytest.mark.parametrize("rank", range(4))
def test_one_of_four_ranks_reads_a_quarter(many_blocks: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    before = CountedStore(many_blocks, monkeypatch).epochs(rank, 4, lanes=1)
    now = CountedStore(many_blocks, monkeypatch).epochs(rank, 4, lanes=None)
    print(f"rank {rank} of 4 reads {now:.3f} of the hidden states an epoch, {before:.3f} where rows are dealt by length")
    assert before > 0.8 and now <= 0.35 * before  # a rank may have none of the 8 rows of a block


@pytest.mark.parametrize(("pieces", "room"), [(1, 16), (4, 16), (1, 34)])
def test_one_rank_reads_every_block_once_an_epoch(many_blocks: Path, monkeypatch: pytest.MonkeyPatch, pieces: int,
                                                  room: int) -> None:
    """With room for as many blocks as are under way, and no more."""
    found = CountedStore(many_blocks, monkeypatch, room).epochs(0, 1, None, pieces, epochs=2)
    print(f"room for {room} blocks, {pieces} pieces: {found:.3f}")
    assert found <= 1.05


@pytest.mark.parametrize(("world", "most"), [(2, 0.54), (3, 0.42), (5, 0.35), (8, 0.17), (16, 0.11)])
def test_so_do_more_ranks(many_blocks: Path, monkeypatch: pytest.MonkeyPatch, world: int, most: float) -> None:
    """3 and 5 divide no step: their ranks have some lanes in common with their neighbours."""
    found = [CountedStore(many_blocks, monkeypatch).epochs(rank, world, None) for rank in {0, world // 2, world - 1}]
    print(f"{world} ranks: {max(found):.3f} at most")
    assert max(found) <= most


def test_rows_that_cost_no_block_are_not_dealt_by_blocks(many_blocks: Path) -> None:
    assert not OnlineStore.reads_blocks
    store = FeatureStore.open(many_blocks, "train")
    assert BatchOrder.of(store, PER_STEP, 0).lanes == 1  # they fit the window
    assert BatchOrder.of(store, PER_STEP, 0, store.blocks[0].bytes * 40).lanes == 16
    store.reads_blocks = False  # type: ignore[misc]
    assert BatchOrder.of(store, PER_STEP, 0, store.blocks[0].bytes * 40).lanes == 1


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_log_partitions_are_dealt_by_blocks(many_blocks: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """The sum of what the ranks compute is what one computes, and each reads its part."""
    monkeypatch.setattr(packed_reader, "ROWS_AT_ONCE", 50)
    torch.manual_seed(0)
    head = VocabHead(torch.randn(30, WIDTH))

    def computed(rank: int, ranks: int) -> tuple[torch.Tensor, float]:
        counted = CountedStore(many_blocks, monkeypatch)
        found = RowReader(counted.store).compute_log_partitions(ProcessGroup(rank, ranks), head, lambda part: part)
        return torch.from_numpy(np.array(found)), counted.share

    parts = [computed(rank, world) for rank in range(world)]
    whole = torch.stack([part for part, _ in parts]).sum(0)
    torch.testing.assert_close(whole, computed(0, 1)[0])
    store = FeatureStore.open(many_blocks, "train")
    for row in (0, 400, len(store) - 1):
        learned = slice(int(store.index.offsets[row]) + 4, int(store.index.offsets[row + 1]))  # what heads learn from
        torch.testing.assert_close(whole[learned], log_partition(store.read(row).hidden[4:], head))
    assert max(share for _, share in parts) < 1 / world + 2.5 / BLOCKS
