"""Recorded steps: the engine's answers do not change, however sizes are rounded up and whatever the other rows hold.

Most machines have no GPU, so a tape replaces a CUDA graph: it records the tensor operations of a step and repeats them. As in
a graph, a number that came from the host keeps its recorded value, and the result is in the same tensor as before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import LlamaForCausalLM

from hydra_core.base import Base, KVCache, load_base
from hydra_core.base.attention import Rotary
from hydra_core.base.fused import FusedDecoder
from hydra_core.base.graphs import KV_LENS, NODES, ROWS, CudaRecorder, GraphedForward, Run, StepInputs, rounded
from hydra_core.decoding import Engine, Result, naive_generate
from hydra_core.errors import InputError
from hydra_core.heads import HeadDrafter
from hydra_core.proposers import AdaptiveDrafter, Drafter, NgramDrafter
from hydra_core.proposers.dynamic import DynamicTreeProposer
from hydra_core.proposers.heads import HeadProposer
from hydra_core.proposers.registry import open_proposer
from hydra_core.sampling import Request
from hydra_core.tree import PLAIN, DraftTree, TreeBatch, TreeSet
from hydra_core.tree.batch import chain
from tests.tiny import make_config
from tests.trained import overfit_heads, random_heads, random_prompts

TREES = TreeSet({1: DraftTree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0))),
                 2: DraftTree(((0,), (0, 0))), 5: PLAIN})
DRAFTERS = ("plain", "ngram", "hydra", "hydra++", "adaptive")
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
"""Operations for whose result the host has to wait."""


class Tape(TorchDispatchMode):
    """The operations of one run, which are repeated on later contents of the same tensors."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            self.output = run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def __call__(self) -> torch.Tensor:
        made: dict[int, torch.Tensor] = {}

        def now(value: Any) -> Any:
            return tree_map_only(torch.Tensor, lambda tensor: made.get(id(tensor), tensor), value)

        for func, args, kwargs, result in self.calls:
            again = func(*now(args), **now(kwargs))
            made.update((id(old), new) for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True)
                        if isinstance(old, torch.Tensor))
        return self.output.copy_(made[id(self.output)])


@pytest.fixture(scope="module")
def trained(tiny_base: Base) -> dict[str, HeadDrafter]:
    return {kind: overfit_heads(tiny_base, kind, random_prompts(6, seed=1)) for kind in ("hydra", "hydra++")}


def drafters(heads: dict[str, HeadDrafter]) -> dict[str, Drafter | None]:
    copying = NgramDrafter(min_match=1)
    return {"plain": None, "ngram": copying, **heads, "adaptive": AdaptiveDrafter(heads["hydra++"], copying)}


@pytest.fixture
def make_engine(tiny_base: Base, trained: dict[str, HeadDrafter], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    monkeypatch.setattr("hydra_core.proposers.heads.recorder_for", lambda device, graphs: None if graphs is False else Tape)

    def make(name: str, **changes: Any) -> Engine:
        engine = Engine(tiny_base, drafters(trained)[name], TREES, **changes)
        engine.forward = GraphedForward(tiny_base, engine.cache, engine.cache.slots - engine.context_limit, Tape)
        engine.cache.waits = True  # accepted nodes move together without a question, as on a GPU
        return engine

    return make


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of a few dozen tokens take several steps, and share beginnings."""
    for name, value in (("BUSY_TOKENS", 24), ("IDLE_TOKENS", 60), ("CHUNK", 20), ("SHARED_TOKENS", 8), ("SHORT_PROMPT", 8)):
        monkeypatch.setattr(f"hydra_core.decoding.scheduler.{name}", value)


def recordings(engine: Engine) -> dict[tuple[int, int, int], Run]:
    assert isinstance(engine.forward, GraphedForward)
    return engine.forward.recorded


def drafts(engine: Engine) -> dict[tuple[int, DraftTree, int, int], Run]:
    """The recordings of drafting with fixed trees."""
    proposer = engine.proposer
    return proposer.recorded.recorded if isinstance(proposer, HeadProposer) and proposer.recorded is not None else {}


def mixed_requests(seed: int, count: int) -> list[Request]:
    """Short and long prompts, some with beginnings in common, greedy and sampled."""
    dice = random.Random(seed)
    text = random_prompts(1, seed=seed)[0] * 200
    prompts = [text[:(110, 3, 180, 20, 70)[i % 5]] + prompt for i, prompt in enumerate(random_prompts(count, seed=seed))]
    prompts += random_prompts(6, seed=1)  # what heads were trained on
    return [Request(f"r{i}", prompt, (60, 8, 30, 1)[i % 4], stop_ids=(), seed=i, temperature=dice.choice((0.0, 0.0, 0.8)))
            for i, prompt in enumerate(prompts)]


def serve(engine: Engine, requests: list[Request], dice: random.Random, cancelled: set[str]) -> dict[str, Result]:
    """Run all requests, which join at random steps; some are cancelled at a random step."""
    waiting, results = list(requests), dict[str, Result]()
    while waiting or engine.has_work:
        for _ in range(dice.randint(0, 2)):
            if waiting:
                engine.add(waiting.pop(0))
        for name in sorted(cancelled & engine.scheduler.ids):
            if dice.random() < 0.2:
                engine.cancel(name)
        results.update({output.id: output.result for output in engine.step() if output.result})
    return results


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("max_batch_size", [1, 5])
def test_a_running_batch_equals_naive(tiny_base: Base, make_engine: Callable[..., Engine], small_steps: None, name: str,
                                      max_batch_size: int) -> None:
    """Sequences join, leave and are cancelled while prompts are computed; contexts grow over several rounded sizes."""
    requests = mixed_requests(seed=max_batch_size, count=4 + 4 * max_batch_size)
    cancelled = {request.id for request in requests[3::5]}
    engine = make_engine(name, max_batch_size=max_batch_size)
    results = serve(engine, requests, random.Random(7), cancelled)
    for request in requests:
        if results[request.id].finish_reason != "cancelled":
            assert results[request.id].token_ids == naive_generate(tiny_base, request).token_ids, request.id
    recorded = recordings(engine)
    assert len({kv_len for _, _, kv_len in recorded}) >= 2
    assert {rows for rows, _, _ in recorded} == ({1} if max_batch_size == 1 else {1, 2, 4, 5})
    alone = Request("alone", random_prompts(6, seed=1)[0], 30, stop_ids=())  # what heads were trained on
    results["alone"] = engine.generate([alone])[0]
    assert results["alone"].token_ids == naive_generate(tiny_base, alone).token_ids
    assert max(result.accepted for result in results.values()) > 0 or name == "plain"


@pytest.mark.parametrize("name", ["hydra", "hydra++"])
@pytest.mark.parametrize("max_batch_size", [1, 5])
def test_recorded_drafts_are_those_that_were_not(tiny_base: Base, trained: dict[str, HeadDrafter], small_steps: None,
                                                 make_engine: Callable[..., Engine], name: str, max_batch_size: int) -> None:
    """At each step, with prompts computed beside them and sequences leaving, as many tokens are accepted as without recording."""
    mixed = mixed_requests(seed=max_batch_size, count=4 + 4 * max_batch_size)
    requests = [replace(request, temperature=0.0) for request in mixed]
    engine = make_engine(name, max_batch_size=max_batch_size)
    plain = Engine(tiny_base, drafters(trained)[name], TREES, max_batch_size=max_batch_size, graphs=False)
    results, wanted = (serve(which, requests, random.Random(7), {"r3", "r8"}) for which in (engine, plain))
    for request in requests:
        ours, theirs = results[request.id], wanted[request.id]
        assert (ours.token_ids, ours.steps, ours.accepted_lengths) == (theirs.token_ids, theirs.steps, theirs.accepted_lengths)
    assert {rows for rows, *_ in drafts(engine)} == ({1} if max_batch_size == 1 else {1, 2}) and not drafts(plain)
    assert len({width for *_, width, _ in drafts(engine)}) > (name == "hydra++"), "prompts that waited were read too"


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_context_limit_is_reached_beside_others(tiny_base: Base, make_engine: Callable[..., Engine], small_steps: None,
                                                    name: str) -> None:
    """Sequences that end at the limit, with drafts past it, leave lengths in the cache's unused rows; prompts that end one token
    short of the limit are computed beside trees."""
    prompts = [((9, 8, 7) * 10 + (i,))[i % 7 * 2:] if i % 3 else random_prompts(1, seed=i, longest=3)[0] for i in range(24)]
    requests = [Request(f"c{i}", prompt, (100, 3, 9)[i % 3], stop_ids=()) for i, prompt in enumerate(prompts)]
    engine = make_engine(name, max_batch_size=4, context_limit=32)
    results = engine.generate(requests)
    for request, result in zip(requests, results, strict=True):
        wanted = naive_generate(tiny_base, request, 32)
        assert (result.token_ids, result.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    assert any(result.finish_reason == "context" for result in results)


def test_recordings_are_bounded_and_ask_nothing(make_engine: Callable[..., Engine]) -> None:
    """A second load uses the recordings of the first and adds only new sizes; no recording waits for the host."""
    engine = make_engine("hydra++", max_batch_size=5)
    serve(engine, mixed_requests(1, 20), random.Random(1), set())
    first, drafted = dict(recordings(engine)), dict(drafts(engine))
    serve(engine, mixed_requests(1, 20), random.Random(1), set())
    assert recordings(engine) == first and drafts(engine) == drafted, "the same load records nothing new"
    allowed = {rounded(rows, ROWS, 5) for rows in range(1, 6)}, {1, 2, 4, 8, 9}, {128, 192, 256, engine.cache.slots}
    assert all(size in sizes for key in first for size, sizes in zip(key, allowed, strict=True))
    for tape in (*first.values(), *drafted.values()):
        assert isinstance(tape, Tape)
        assert not [func for func, *_ in tape.calls if any(word in str(func) for word in ASKS)]


@torch.inference_mode()
def test_it_runs_where_no_question_can_be_asked() -> None:
    """Tensors on the meta device have no contents, so reading one or mixing devices fails."""
    with torch.device("meta"):
        base = Base(None, FusedDecoder(LlamaForCausalLM(make_config())), None, 256, torch.device("meta"))  # type: ignore[arg-type]
        cache = base.allocate(6, 300)
    forward = GraphedForward(base, cache, 12, lambda run: run)
    ids = torch.zeros(3, 5, dtype=torch.int64, device="meta")
    parents = np.array([[-1, 0, 0, 1, 1]])
    assert forward(ids, TreeBatch.of(parents, 2), 140).shape == (3, 5, 32)  # a fixed tree comes from the host
    assert forward(ids, TreeBatch.of(parents.repeat(3, 0), 2), 140).shape == (3, 5, 32)
    assert list(forward.recorded) == [(4, 8, 192)]
    cache.commit((0, 3), torch.zeros(3, 3, dtype=torch.int64, device="meta"), torch.ones(3, dtype=torch.int64, device="meta"))


@torch.inference_mode()
@pytest.mark.parametrize("kv_lens", [KV_LENS, tuple(range(1, 65))], ids=["rounded", "exact"])
def test_rounded_sizes_change_no_state(tiny_base: Base, monkeypatch: pytest.MonkeyPatch, kv_lens: tuple[int, ...]) -> None:
    """Hidden states equal those of a plain forward, and rows that do not decode keep their contents."""
    monkeypatch.setattr("hydra_core.base.graphs.KV_LENS", kv_lens)
    prompts = [list(prompt) for prompt in random_prompts(6, seed=3)]
    cache = tiny_base.allocate(6, 64)
    tiny_base.prefill(prompts, cache, (0, 6))
    cache.lengths[3] = 63  # a row that no sequence uses, after one that ended past the limit
    forward = GraphedForward(tiny_base, cache, 12, Tape)
    generator = torch.Generator().manual_seed(4)
    shapes = [chain(7).parents, torch.tensor([[-1, 0, 0, 1, 2, 2]] * 3), torch.tensor([[-1, 0, 1], [-1, 0, 0], [-1, 0, 1]]),
              torch.tensor([[-1, 0, 1, 2, 3]]), chain(3).parents]
    for parents in shapes:  # of different rounded sizes: the shape of an earlier tree must not be visible
        ids = torch.randint(3, 259, (3, parents.shape[1]), generator=generator)
        forest = TreeBatch.of(parents.numpy(), 6)
        wanted = tiny_base.forward(ids, cache, (0, 3), forest)
        before = [cache.keys[:, row, :len(prompts[row])].clone() for row in range(6)]
        hidden = forward(ids, forest, int(cache.lengths[:3].max()))
        torch.testing.assert_close(hidden, wanted, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(kept, cache.keys[:, row, :len(prompts[row])]) for row, kept in enumerate(before))
    assert forward(ids, forest, 61).shape == (3, 3, 32), "what fits without rounding up goes without"
    with pytest.raises(ValueError, match="do not fit 64 slots"):
        forward(ids, forest, 62)


@pytest.mark.parametrize("seed", range(5))
def test_accepted_nodes_move_the_same_without_a_question(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    caches = [KVCache(2, 4, 20, 2, 4, torch.float32) for _ in range(2)]
    caches[1].waits = True
    keys = torch.randn(caches[0].keys.shape, generator=generator)
    paths = torch.stack([torch.randperm(5, generator=generator).add(1).sort().values[:4] for _ in range(3)])
    paths[:, 0], counts = 0, torch.randint(1, 5, (3,), generator=generator)
    for cache in caches:
        cache.keys.copy_(keys)
        cache.values.copy_(-keys)
        cache.lengths.copy_(torch.tensor([3, 14, 0, 9]))
        cache.commit((0, 3), paths, counts)
    assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)


def test_sizes() -> None:
    assert [rounded(value, NODES, 12) for value in (1, 3, 8, 9, 12, 13)] == [1, 4, 8, 12, 12, 12]
    assert rounded(9, (1, 2, 4), 20) == 20
    assert KV_LENS[:6] == (128, 192, 256, 384, 512, 768) and KV_LENS[-1] > 2**20
    assert ROWS[:4] == (1, 2, 4, 8)
    inputs = StepInputs(2, 3, torch.device("cpu"))
    inputs.fill(torch.tensor([[5, 6]]), chain(2))
    assert inputs.ids.tolist() == [[5, 6, 0], [0, 0, 0]] and inputs.trees.depths.tolist() == [[0, 1, 0]] * 2
    assert inputs.trees.ancestors[1].tolist() == [[True, False, False], [True, True, False], [False, False, True]]


def test_who_records(tiny_base: Base) -> None:
    assert not any(isinstance(Engine(tiny_base, graphs=graphs).forward, GraphedForward) for graphs in (None, False))
    with pytest.raises(InputError, match="graphs=True"):
        Engine(tiny_base, graphs=True)


def test_devices_follow_the_base() -> None:
    """Dynamic trees are made on the host; a tree that does not change is copied to the device once."""
    proposer = open_proposer(NgramDrafter(), TreeSet({1: PLAIN}), 2, 64, device="meta")
    assert isinstance(proposer, DynamicTreeProposer)
    assert proposer.device.type == "meta" and isinstance(proposer.acceptance.edges, np.ndarray)
    forest, meta = TREES.trees[1].as_batch, torch.device("meta")
    assert forest.to(meta) is forest.to(meta) and forest.to(meta).parents.device == meta
    assert forest.to(torch.device("cpu")) is forest


def test_rotary_tables_ask_only_where_nothing_is_known() -> None:
    rotary = Rotary(torch.ones(2), 1.0, torch.float32)
    positions = torch.tensor([[1500]])
    assert torch.equal(rotary.at(positions, 1501)[0], Rotary(torch.ones(2), 1.0, torch.float32).at(positions)[0])
    meta = Rotary(torch.ones(2, device="meta"), 1.0, torch.float32)
    assert meta.at(torch.zeros(1, 3, dtype=torch.int64, device="meta"), 2000)[0].shape == (1, 3, 1, 4)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@needs_cuda
@pytest.mark.parametrize("name", DRAFTERS)
def test_cuda_graphs_equal_naive(tiny_base_dir: Path, tmp_path: Path, trained: dict[str, HeadDrafter], small_steps: None,
                                 name: str) -> None:
    """In float32, token for token; a longer engine of the same base, made in between, does not disturb the recordings."""
    base = load_base(str(tiny_base_dir), dtype="fp32", device="cuda", cache=tmp_path)
    heads = {kind: random_heads(base, kind) for kind in trained}
    for kind, there in heads.items():
        there.load_state_dict(trained[kind].state_dict())
    engine = Engine(base, drafters(heads)[name], TREES, max_batch_size=5)
    for seed in (1, 2):
        requests = mixed_requests(seed, 24)
        results = serve(engine, requests, random.Random(seed), set())
        for request in requests:
            assert results[request.id].token_ids == naive_generate(base, request).token_ids, request.id
        base.allocate(1, 5000)
    assert len(recordings(engine)) > 3


@needs_cuda
@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cuda_graphs_equal_the_forward(tiny_base_dir: Path, tmp_path: Path, dtype: str) -> None:
    base = load_base(str(tiny_base_dir), dtype=dtype, device="cuda", cache=tmp_path)
    cache = base.allocate(6, 200)
    base.prefill([list(prompt) for prompt in random_prompts(6, seed=3)], cache, (0, 6))
    forward = GraphedForward(base, cache, 12, CudaRecorder(base.device))
    forest = TREES.trees[1].as_batch
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(3, 259, (3, forest.size), device="cuda")
        wanted = base.forward(ids, cache, (0, 3), forest)
        hidden = forward(ids, forest, int(cache.lengths[:3].max()))
        tolerance = 1e-4 if dtype == "fp32" else 0.1
        torch.testing.assert_close(hidden, wanted, atol=tolerance, rtol=tolerance)
        cache.lengths[:3] += 40  # the same recording, or one of another kv_len
    assert len(forward.recorded) >= 1
