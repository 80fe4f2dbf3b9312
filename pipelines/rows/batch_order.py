"""The rows of each training step, and each rank's part of them: pure functions of the seed, the step and the stored rows.

Rows that fit the window together are shuffled as one, and a step's rows are dealt to ranks by length. More rows than that are
dealt by blocks, so that a rank reads its own part of the hidden states:

    epoch    blocks shuffled, cut into lanes     lane 0: b7 b2 b9   lane 1: b9 b0 b5   lane 2: b5 b1 b8   lane 3: b8 b3 b4
    step     rows_per_step seats, of one lane each       0 1 2 3            4 5 6 7         8 9 10 11       12 13 14 15
    ranks    consecutive seats                   rank 0: 0 - - - - - - - - - - - 7  rank 1: 8 - - - - - - - - - - - 15

The rows of a step depend on no world size. A lane has as many rows as its seats need in the epoch, so every row occurs once in
it; a block on a cut belongs to both lanes. A lane is shuffled in windows, its part of the whole window: all lanes together keep
to the budget of one process, and each of several ranks needs its part of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from pipelines.rows.feature_store import CACHE_BYTES
from pipelines.rows.packed_reader import ProcessGroup
from pipelines.rows.row_index import RowStore


@dataclass(frozen=True)
class BatchOrder:
    """The rows of each step.

    `block`: [n] int64, the block of each row; `block_bytes`: [blocks] int64; `lengths`: [n] int64, tokens of each row; `lanes`:
    1 deals the rows of a step by length, whatever block they are in.
    """

    block: np.ndarray
    block_bytes: np.ndarray
    lengths: np.ndarray
    rows_per_step: int
    seed: int
    lanes: int
    window_bytes: int = CACHE_BYTES
    _epochs: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, store: RowStore, rows_per_step: int, seed: int, window_bytes: int = CACHE_BYTES,
           lanes: int | None = None) -> BatchOrder:
        """`lanes`: those of the run that is resumed; default: as many as suit the store."""
        block, sizes = store.index.block, np.array([block.bytes for block in store.blocks])
        if lanes is None:
            lanes = lanes_for(sizes[np.unique(block)], rows_per_step, window_bytes) if store.reads_blocks else 1
        return cls(block, sizes, store.index.lengths, rows_per_step, seed, lanes, window_bytes)

    def total_steps(self, epochs: float) -> int:
        """Number of steps in which every row occurs at least `epochs` times."""
        return max(1, int(np.ceil(round(epochs * len(self.block) / self.rows_per_step, 9))))

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of step `step`, [rows_per_step] int64, by seat: consecutive places of one epoch after the other."""
        at = step * self.rows_per_step + np.arange(self.rows_per_step)
        epochs, places = at // len(self.block), at % len(self.block)
        return np.concatenate([self._epoch(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def pieces(self, step: int, group: ProcessGroup, count: int) -> list[np.ndarray]:
        """Row numbers of the `count` pieces of a rank, each [about rows_per_step / world size / count] int64."""
        rows = self.rows(step)
        if self.lanes == 1:
            first, parts = group.rank * count, group.world_size * count
        else:
            rows, first, parts = rows[seats_of(group, len(rows))], 0, count
        return [share_of(rows, self.lengths, first + piece, parts) for piece in range(count)]

    def _epoch(self, epoch: int) -> np.ndarray:
        """The permutation of the rows in one epoch, [n] int64."""
        if epoch not in self._epochs:
            for old in [known for known in self._epochs if known < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch] = self._shuffled(epoch) if self.lanes == 1 else self._in_lanes(epoch)
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Blocks shuffled, grouped into windows, rows shuffled inside a window; one window holds them all if they fit."""
        random = np.random.default_rng([self.seed, epoch])
        used = np.unique(self.block)
        random.shuffle(used)
        window = np.zeros(len(self.block_bytes), np.int64)
        window[used] = _windows(self.block_bytes[used], np.zeros(len(used), np.int64), self.window_bytes)
        # Sorted by window, then by a random key: one sort shuffles all windows.
        order: np.ndarray = np.lexsort((random.permutation(len(self.block)), window[self.block]))
        return order

    def _in_lanes(self, epoch: int) -> np.ndarray:
        """Every lane in its seats, shuffled in windows, with about as many tokens in the seats of each rank.

        Inside a window the shortest row comes where the random key of a place is lowest, and so on. A step has about
        two keys in each of rows_per_step / 2 strata, dealt to the seats so that neighbours together have the mean.
        """
        count, per_step, random = len(self.block), self.rows_per_step, np.random.default_rng([self.seed, epoch])
        at = epoch * count + np.arange(count)
        step, seat = at // per_step - epoch * count // per_step, at % per_step
        lane = seat * self.lanes // per_step
        rows, window_of_row = self._lane_rows(random, np.bincount(lane, minlength=self.lanes))
        window_of_place = np.empty(count, np.int64)
        window_of_place[np.argsort(lane, kind="stable")] = window_of_row
        strata = _balanced(per_step // 2)
        turn, shift = random.integers(0, len(strata), step[-1] + 1), random.random(step[-1] + 1)
        key = strata[(seat ^ turn[step]) % len(strata)] + shift[step]
        order = np.empty(count, np.int64)
        by_length = np.lexsort((random.permutation(count), self.lengths[rows], window_of_row))
        order[np.lexsort((key, window_of_place))] = rows[by_length]
        return order

    def _lane_rows(self, random: np.random.Generator, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows, lane after lane with `counts` rows each, and the window of each: [n] int64 both."""
        used = np.unique(self.block)
        random.shuffle(used)
        turn = np.empty(len(self.block_bytes), np.int64)
        turn[used] = np.arange(len(used))
        lanes = np.split(np.argsort(turn[self.block], kind="stable"), np.cumsum(counts)[:-1])
        # every other one backwards: neighbours need the block on their cut at one time, and a rank that has both reads it once
        rows = np.concatenate([lane[::1 if number % 2 else -1] for number, lane in enumerate(lanes)])
        lane, block = np.repeat(np.arange(len(counts)), counts), self.block[rows]
        begins = np.flatnonzero((np.diff(lane, prepend=-1) != 0) | (np.diff(block, prepend=-1) != 0))
        windows = _windows(self.block_bytes[block[begins]], lane[begins], self.window_bytes // self.lanes)
        return rows, np.repeat(windows, np.diff(begins, append=len(rows)))


def lanes_for(block_bytes: np.ndarray, rows_per_step: int, window_bytes: int) -> int:
    """Number of lanes for blocks of [n] bytes: 1 if they fit the window together, at most so many that a block of each fits it.

    Of these it has the largest divisor in common with `rows_per_step`, as world sizes have: few ranks then share a lane.
    """
    if block_bytes.sum() <= window_bytes:
        return 1
    most = max(1, min(window_bytes // int(block_bytes.max()), rows_per_step))
    return max(range(1, most + 1), key=lambda lanes: (math.gcd(lanes, rows_per_step), lanes))


def seats_of(group: ProcessGroup, seats: int) -> slice:
    """The seats of a rank, as evenly as they can be parted."""
    return slice(group.rank * seats // group.world_size, (group.rank + 1) * seats // group.world_size)


def share_of(rows: np.ndarray, lengths: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The rows of one step that rank `rank` of `world_size` takes, so that all ranks have about as many tokens.

    Rows are dealt out longest first, to the ranks in ascending order, then in descending order, and so on.
    """
    ordered = rows[np.argsort(-lengths[rows], kind="stable")]
    turn = np.arange(len(ordered)) % (2 * world_size)
    dealt = np.where(turn < world_size, turn, 2 * world_size - 1 - turn)
    share: np.ndarray = ordered[dealt == rank]
    return share


def _windows(sizes: np.ndarray, lane: np.ndarray, most: int) -> np.ndarray:
    """The window of each of n blocks in order, [n] int64: at most `most` bytes, but at least one block, of one lane."""
    found = np.zeros(len(sizes), np.int64)
    filled, number, last = 0, 0, lane[0]
    for at, (size, here) in enumerate(zip(sizes.tolist(), lane.tolist(), strict=True)):
        if here != last or (filled and filled + size > most):
            filled, number = 0, number + 1
        found[at], last = number, here
        filled += size
    return found


def _balanced(most: int) -> np.ndarray:
    """The numbers below the largest power of two up to `most` (at least 1): [that power] int64. Pairs of neighbours, counted from
    the start, have the same sum, and so have fours, eights and so on."""
    found = np.zeros(1, np.int64)
    while 2 * len(found) <= most:
        found = np.stack([found, 2 * len(found) - 1 - found], 1).ravel()
    return found
