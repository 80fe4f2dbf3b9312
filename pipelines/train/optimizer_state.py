"""Weights and moments of the optimizer on disk, whatever number of workers writes them and whatever number reads them.

DeepSpeed's own checkpoint belongs to the number of ranks that wrote it, and its universal one takes a conversion of pickles that
knows no stage 0. Each rank writes what it holds, without any exchange: its parts of the float32 weights and of both moments of
AdamW, each under the name of its parameter and the place of its first number in it. A rank that reads looks up its own places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hydra_core.errors import StoppedError

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
UPDATES = "updates"
"""Number of updates, which AdamW corrects its moments by, in the metadata of each file."""


@dataclass(frozen=True)
class Part:
    """Consecutive numbers of a parameter: `count` from `start` on lie at `place` of the optimizer's own flat float32 `tensor`."""

    name: str
    start: int
    count: int
    tensor: Tensor
    place: int

    def of(self, like: Tensor) -> Tensor:
        """The numbers of this part in a tensor that is laid out as `tensor` is: [count], a view."""
        return like.detach().view(-1)[self.place:self.place + self.count]


def save_state(engine: Any, folder: Path, rank: int) -> None:
    """Write this rank's parts into `folder`. Every rank calls it; where all hold the same, the first writes alone."""
    parts, states = list(_parts(engine)), _states(engine)
    if engine.zero_optimization_stage() == 0 and rank:
        return
    tensors: dict[str, Tensor] = {}
    updates = 0
    for part in parts:
        found = {WEIGHT: part.tensor} | {name: states[part.tensor][name] for name in MOMENTS if name in states[part.tensor]}
        tensors |= {f"{kind}/{part.name}/{part.start}": part.of(tensor).float().cpu().clone() for kind, tensor in found.items()}
        updates = max(updates, int(states[part.tensor].get("step", 0)))
    save_file(tensors, folder / f"state-{rank}.safetensors", metadata={UPDATES: str(updates)})


def load_state(engine: Any, folder: Path, rank: int) -> None:
    """Read what any number of ranks wrote. Every rank calls it. Raises StoppedError for a folder that lacks a part."""
    states = _states(engine)
    with torch.no_grad(), ExitStack() as opened:
        written = _Written(folder, opened)
        fresh: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        for part in _parts(engine):
            part.of(part.tensor).copy_(written.read(WEIGHT, part.name, part.start, part.count))
            if not written.has(MOMENTS[0], part.name):
                continue  # a parameter that never had a gradient
            _, moments = fresh.setdefault(id(part.tensor), (part.tensor, {
                name: torch.zeros_like(part.tensor, memory_format=torch.preserve_format) for name in MOMENTS}))
            for name, tensor in moments.items():
                part.of(tensor).copy_(written.read(name, part.name, part.start, part.count))
        for tensor, moments in fresh.values():
            # fused AdamW keeps the number of its updates beside the weights, on their device
            states[tensor] = {"step": torch.tensor(float(written.updates), device=tensor.device), **moments}
        _fill_model(engine, written, rank)


def _fill_model(engine: Any, written: _Written, rank: int) -> None:
    """Give the model the weights, in its own number format: what the optimizer holds is another copy."""
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() < 3:
            parameter.copy_(written.whole(name, parameter.shape))
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # what the first rank writes goes to all
            if rank == 0:
                parameter.copy_(written.whole(name, parameter.shape))


class _Written:
    """The parts in the files of a checkpoint."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.folder, self.updates = folder, 0
        self._found: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            file = opened.enter_context(safe_open(path, "pt"))  # type: ignore[no-untyped-call]
            self.updates = max(self.updates, int(file.metadata()[UPDATES]))
            for key in file.keys():  # noqa: SIM118  # it is no mapping
                kind, name, start = key.split("/")
                self._found.setdefault((kind, name), []).append((int(start), file, key))

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self._found

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """`count` numbers of a parameter from `start` on: [count] float32. Raises StoppedError if not all are there."""
        found, filled = torch.empty(count), 0
        for begin, file, key in self._found.get((kind, name), []):
            size = file.get_slice(key).get_shape()[0]
            first, last = max(begin, start), min(begin + size, start + count)
            if first < last:
                found[first - start:last - start] = file.get_slice(key)[first - begin:last - begin]
                filled += last - first
        if filled != count:
            raise StoppedError(f"{self.folder}: the checkpoint has {filled} of {count} numbers of {kind} {name}: it is damaged; "
                               "delete the `state` folder above it to train from the start")
        return found

    def whole(self, name: str, shape: torch.Size) -> Tensor:
        """The weights of a parameter, float32."""
        return self.read(WEIGHT, name, 0, shape.numel()).view(shape)


def _states(engine: Any) -> Any:
    """The states of AdamW, by the tensor that it updates. DeepSpeed wraps it, except without ZeRO in float32."""
    optimizer: Any = engine.optimizer
    return getattr(optimizer, "optimizer", optimizer).state


def _parts(engine: Any) -> Iterator[Part]:
    """What this rank's optimizer holds. DeepSpeed has an optimizer class for each way to lay it out."""
    optimizer, names = engine.optimizer, {id(one): name for name, one in engine.module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3: each parameter is cut into as many parts as there are ranks
        for group in optimizer.fp16_groups:
            for one in group:
                index, place, most = optimizer.grad_position[optimizer.get_param_id(one)]
                start = most * optimizer._get_param_partition_rank(one)
                if (count := min(most, one.ds_numel - start)) > 0:
                    yield Part(names[id(one)], start, count, optimizer.fp32_partitioned_groups_flat[index], place)
    elif flat := getattr(optimizer, "single_partition_of_fp32_groups", getattr(optimizer, "fp32_groups_flat_partition", None)):
        for index, group in enumerate(optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups):
            for one in group:  # stages 1 and 2: all parameters in a row, which is cut
                if (here := one._hp_mapping) is not None:
                    inside, outside = here.lp_fragment_address, here.hp_fragment_address
                    yield Part(names[id(one)], inside.start, inside.numel, flat[index], outside.start)
    elif hasattr(optimizer, "fp32_groups_flat"):  # no ZeRO, bf16, one float32 tensor
        for tensor, group in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            place = 0
            for one in group:
                yield Part(names[id(one)], 0, one.numel(), tensor, place)
                place += one.numel()
    elif hasattr(optimizer, "fp32_groups"):  # no ZeRO, bf16, a float32 tensor for each parameter
        for tensors, group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for tensor, one in zip(tensors, group, strict=True):
                yield Part(names[id(one)], 0, one.numel(), tensor, 0)
    else:
        for one in engine.module.parameters():
            yield Part(names[id(one)], 0, one.numel(), one, 0)
