"""The base's forward of a decoding step as a CUDA graph: recorded once for each rounded size, replayed ever after.

A step of small matrices is hundreds of kernels that a GPU ends sooner than a CPU can launch them; a graph launches them
all at once. It repeats the very kernels on the very addresses it was recorded with, so sizes are rounded up (rows, nodes
of a row, slots that attention reads) and everything that changes is read from the device: token ids and the trees' shapes
from buffers that are filled before each replay, lengths from the cache itself.

What is added by rounding touches nothing:
- a node beyond a row's own writes past the row's end, where no other node looks and the next step writes;
- a row beyond the decoding ones (its prompt is going in, or it is nobody's) writes past its own end, or to its last slots,
  which no prompt reaches;
- a slot beyond a row's end is hidden by the mask, as ever.
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
SPANS = tuple(sorted(size * 2**power for power in range(1, 15) for size in (64, 96)))
"""From 128 slots on, twice as many in two steps: at most a third of what attention reads is for nothing."""

Run = Callable[[], Tensor]
Recorder = Callable[[Run], Run]
"""Makes of a function of fixed tensors one that repeats it on what they hold by then, and returns the same tensor."""
StepForward = Callable[[Tensor, TreeBatch, int, Tensor | None], Tensor]
"""As `GraphedForward.__call__`."""


def rounded(value: int, sizes: Sequence[int], most: int) -> int:
    """The smallest of `sizes` that `value` fits in, or `most` where that is less."""
    return min(next((size for size in sizes if size >= value), most), most)


class StepInputs:
    """What a recorded forward of B rows x N nodes reads: `ids` [B, N] int64 and `forest`, in buffers of their own."""

    def __init__(self, rows: int, nodes: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, nodes, dtype=torch.int64, device=device)
        itself = torch.eye(nodes, dtype=torch.bool, device=device).repeat(rows, 1, 1)
        # a forward reads depths and ancestors alone
        self.forest = TreeBatch(torch.full_like(self.ids, -1), torch.zeros_like(self.ids), itself, nodes - 1)
        self._filled: TreeBatch | None = None

    def fill(self, ids: Tensor, forest: TreeBatch) -> None:
        """Take b <= B rows of n <= N tokens [b, n] and their trees.

        Nodes beyond those may keep the shape that an earlier tree left there, since no node looks at a later one.
        """
        batch, nodes = ids.shape
        self.ids[:batch, :nodes] = ids
        if forest is not self._filled:
            rows = slice(None) if len(forest.parents) == 1 else slice(batch)
            self.forest.depths[rows, :nodes] = forest.depths
            self.forest.ancestors[rows, :nodes, :nodes] = forest.ancestors
            self._filled = forest


class GraphedForward:
    """`Base.forward` of decoding rows 0 .. b - 1 of one cache, with up to `nodes` nodes a row, by recorded steps.

    Every row in use, decoding or not, must have room for `nodes` past its committed tokens. There are at most as many
    recordings as rounded sizes within the cache; they share their memory, and nothing is taken for a request. `recorder`:
    how a step is recorded; see `CudaRecorder`.
    """

    def __init__(self, base: Base, cache: KVCache, nodes: int, recorder: Recorder) -> None:
        assert isinstance(base.decoder, FusedDecoder)
        self.decoder, self.cache, self.nodes, self.recorder = base.decoder, cache, nodes, recorder
        self.inputs: dict[tuple[int, int], StepInputs] = {}
        self.recorded: dict[tuple[int, int, int], Run] = {}
        self._tables: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, ids: Tensor, forest: TreeBatch, longest: int, counts: Tensor | None = None) -> Tensor:
        """Hidden states [b, n, D] of token ids [b, n] int64, as `Base.forward`; they last until the next call.

        `longest`: committed tokens of the longest of the b rows; `counts`: not looked at, a recording takes all nodes. Raises
        ValueError when a row has no room for the nodes.
        """
        batch, nodes = ids.shape
        forest = forest.to(self.cache.lengths.device)  # once, for all who read it
        rows, slots = rounded(batch, ROWS, self.cache.rows), self.cache.slots
        padded = rounded(nodes, NODES, min(self.nodes, slots - longest))
        if nodes > padded:
            raise ValueError(f"{nodes} nodes on top of {longest} tokens do not fit {slots} slots, {self.nodes} of them for nodes")
        inputs = self.inputs.get((rows, padded))
        if inputs is None:
            inputs = self.inputs[rows, padded] = StepInputs(rows, padded, self.cache.lengths.device)
        inputs.fill(ids, forest)
        span = rounded(longest + padded, SPANS, slots)
        run = self.recorded.get((rows, padded, span))
        if run is None:
            run = self.recorded[rows, padded, span] = self._record(inputs, span)
        return run()[:batch, :nodes]

    def _record(self, inputs: StepInputs, span: int) -> Run:
        began = time.perf_counter()
        rows, nodes = inputs.ids.shape

        def forward() -> Tensor:
            return self.decoder(inputs.ids, self.cache, self.cache.plan((0, rows), inputs.forest, span))

        run = self.recorder(forward)
        # a longer cache of the same base replaces the tables, and this recording goes on reading these
        self._tables.append((self.decoder.rotary.cos, self.decoder.rotary.sin))
        log.info("recorded a step of %d rows x %d nodes over %d tokens in %.1f s; %d are kept", rows, nodes, span,
                 time.perf_counter() - began, len(self.recorded) + 1)
        return run


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: what one leaves behind, the next may overwrite."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self.device):
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):  # libraries set themselves up at their first call, which no graph may hold
                run()
            torch.cuda.current_stream().wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # other threads may go on
                output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def recorder_for(device: torch.device, graphs: bool | None = None) -> Recorder | None:
    """What records steps on `device`, or None where none are to be: off CUDA, or when `graphs` is False."""
    return CudaRecorder(device) if device.type == "cuda" and graphs is not False else None


def step_forward(base: Base, cache: KVCache, nodes: int, graphs: bool | None = None) -> StepForward:
    """The forward of decoding steps over `cache`, of up to `nodes` nodes a row: recorded, or as it is written.

    `graphs`: None records where that can be done: on a CUDA device, with the fused decoder. Raises InputError when it is
    asked for elsewhere.
    """
    able = base.device.type == "cuda" and isinstance(base.decoder, FusedDecoder)
    if graphs and not able:
        raise InputError("graphs=True: steps are recorded on a CUDA device and of the fused decoder alone: leave it unset")
    if able and (recorder := recorder_for(base.device, graphs)) is not None:
        return GraphedForward(base, cache, nodes, recorder)

    def forward(ids: Tensor, forest: TreeBatch, longest: int, counts: Tensor | None = None) -> Tensor:
        return base.forward(ids, cache, (0, len(ids)), forest, counts)

    return forward
