"""The base's forward of a decoding step as a CUDA graph: recorded once for each rounded size, then replayed.

A step with small matrices is hundreds of kernels, which a GPU finishes faster than a CPU can launch them; a graph launches all
of them at once. A graph repeats the same kernels on the same addresses, so sizes are rounded up (rows, nodes per row, slots
that attention reads), and everything that changes is read from the device: token ids and the trees' shapes from buffers that
are filled before each replay, lengths from the cache itself.

Rounding up changes no result:
- a node past a row's own nodes writes past the row's end, where no other node looks and which the next step overwrites;
- a row that does not decode (its prompt is being computed, or no sequence uses it) writes past its own end, or to its last
  slots, which no prompt reaches;
- the mask hides all slots past a row's end, as in any other step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hydra_core.base.fused import FusedDecoder
from hydra_core.base.kv_cache import KVCache
from hydra_core.base.model import Base
from hydra_core.errors import InputError
from hydra_core.tree.batch import TreeBatch

log = logging.getLogger(__name__)

ROWS = tuple(2**power for power in range(11))
NODES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
KV_LENS = tuple(sorted(size * 2**power for power in range(1, 15) for size in (64, 96)))
"""Rounded numbers of slots that attention reads: 128, 192, 256, 384, ... At most a third of them is read without need."""

Run = Callable[[], Tensor]
Recorder = Callable[[Run], Run]
"""Turns a function of fixed tensors into one that repeats it on their current contents and returns the same tensor."""
StepForward = Callable[[Tensor, TreeBatch, int, Tensor | None], Tensor]
"""As `GraphedForward.__call__`."""


def rounded(value: int, sizes: Sequence[int], most: int) -> int:
    """The smallest of `sizes` that is at least `value`, but never more than `most`."""
    return min(next((size for size in sizes if size >= value), most), most)


class StepInputs:
    """The inputs of a recorded forward of B rows x N nodes, in buffers that stay where they are: `ids` [B, N] int64, `trees`."""

    def __init__(self, rows: int, nodes: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, nodes, dtype=torch.int64, device=device)
        itself = torch.eye(nodes, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        # a forward reads only depths and ancestors
        self.trees = TreeBatch(torch.full_like(self.ids, -1), torch.zeros_like(self.ids), itself, nodes - 1)
        self._filled: TreeBatch | None = None

    def fill(self, ids: Tensor, trees: TreeBatch) -> None:
        """Copy b <= B rows of n <= N tokens [b, n] and their trees into the buffers.

        Nodes past n may keep the shape of an earlier tree, since no node looks at a later one.
        """
        batch, nodes = ids.shape
        self.ids[:batch, :nodes] = ids
        if trees is not self._filled:
            rows = slice(None) if len(trees.parents) == 1 else slice(batch)
            self.trees.depths[rows, :nodes] = trees.depths
            self.trees.ancestors[rows, :nodes, :nodes] = trees.ancestors
            self._filled = trees


class GraphedForward:
    """`Base.forward` of the decoding rows 0 .. b - 1 of one cache, with up to `nodes` nodes per row, by recorded steps.

    Every row in use, decoding or not, must have room for `nodes` past its committed tokens. There are at most as many
    recordings as rounded sizes within the cache; they share their memory, and a request allocates none. `recorder`: how a
    step is recorded; see `CudaRecorder`; `taps`: as `Base.forward` takes them, the same for all recordings.
    """

    def __init__(self, base: Base, cache: KVCache, nodes: int, recorder: Recorder, taps: Sequence[int] = ()) -> None:
        assert isinstance(base.decoder, FusedDecoder)
        self.decoder, self.cache, self.nodes, self.recorder, self.taps = base.decoder, cache, nodes, recorder, tuple(taps)
        self.inputs: dict[tuple[int, int], StepInputs] = {}
        self.recorded: dict[tuple[int, int, int], Run] = {}
        self._tables: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, ids: Tensor, trees: TreeBatch, longest: int, counts: Tensor | None = None) -> Tensor:
        """Hidden states [b, n, D] of token ids [b, n] int64, as `Base.forward`; the next call overwrites them.

        `longest`: committed tokens of the longest of the b rows; `counts`: ignored, a recording computes all nodes. Raises
        ValueError when a row has no room for the nodes.
        """
        batch, nodes = ids.shape
        trees = trees.to(self.cache.lengths.device)  # one transfer for all that read it
        rows, slots = rounded(batch, ROWS, self.cache.rows), self.cache.slots
        padded = rounded(nodes, NODES, min(self.nodes, slots - longest))
        if nodes > padded:
            raise ValueError(f"{nodes} nodes on top of {longest} tokens do not fit {slots} slots, {self.nodes} of them for nodes")
        inputs = self.inputs.get((rows, padded))
        if inputs is None:
            inputs = self.inputs[rows, padded] = StepInputs(rows, padded, self.cache.lengths.device)
        inputs.fill(ids, trees)
        kv_len = rounded(longest + padded, KV_LENS, slots)
        run = self.recorded.get((rows, padded, kv_len))
        if run is None:
            run = self.recorded[rows, padded, kv_len] = self._record(inputs, kv_len)
        return run()[:batch, :nodes]

    def _record(self, inputs: StepInputs, kv_len: int) -> Run:
        began = time.perf_counter()
        rows, nodes = inputs.ids.shape

        def forward() -> Tensor:
            metadata = self.cache.build_metadata((0, rows), inputs.trees, kv_len)
            return self.decoder(inputs.ids, self.cache, metadata, taps=self.taps)

        run = self.recorder(forward)
        # keep the tables alive: a longer cache of the same base replaces them, but this recording still reads them
        self._tables.append((self.decoder.rotary.cos, self.decoder.rotary.sin))
        log.info("recorded a step of %d rows x %d nodes over %d tokens in %.1f s; %d are kept", rows, nodes, kv_len,
                 time.perf_counter() - began, len(self.recorded) + 1)
        return run


class CudaRecorder:
    """Records CUDA graphs that share one memory pool: a replay may overwrite the results of another graph."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            warm_up = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):  # the first call initialises libraries, which cannot be recorded
                run()
            torch.cuda.current_stream().wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # other threads may go on using CUDA
                output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def recorder_for(device: torch.device, graphs: bool | None = None) -> Recorder | None:
    """A recorder for `device`, or None if steps are not recorded: on other devices than CUDA, or when `graphs` is False."""
    return CudaRecorder(device) if device.type == "cuda" and graphs is not False else None


def step_forward(base: Base, cache: KVCache, nodes: int, graphs: bool | None = None, taps: Sequence[int] = ()) -> StepForward:
    """The forward of decoding steps over `cache`, with up to `nodes` nodes per row: recorded, or the plain one. `taps`: as
    `Base.forward` takes them.

    `graphs`: None records steps where that is possible: on a CUDA device, with the fused decoder. Raises InputError when it is
    True elsewhere.
    """
    able = base.device.type == "cuda" and isinstance(base.decoder, FusedDecoder)
    if graphs and not able:
        raise InputError("graphs=True: only the fused decoder on a CUDA device can record steps: leave it unset")
    if able and (recorder := recorder_for(base.device, graphs)) is not None:
        return GraphedForward(base, cache, nodes, recorder, taps)

    def forward(ids: Tensor, trees: TreeBatch, longest: int, counts: Tensor | None = None) -> Tensor:
        return base.forward(ids, cache, (0, len(ids)), trees, counts, taps)

    return forward
