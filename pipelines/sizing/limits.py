"""What does not fit is refused: the part that needs most is named, how much there is, and what to change."""

from __future__ import annotations

from dataclasses import replace

from hydra_core.errors import InputError
from pipelines.sizing.amounts import Parts, Range, StageSize, size_text, total
from pipelines.sizing.hardware import Room, Surroundings

NOT_SPLIT = "use a smaller base or one of fewer bits: one engine does not split a base among GPUs"


def check_fits(sizes: list[StageSize], around: Surroundings) -> list[StageSize]:
    """The sizes, with a note for what may not fit: that an estimate reaches beyond what there is.

    Raises InputError for what cannot fit, by the lower ends of the estimates.
    """
    checked = []
    for size in sizes:
        here = -(-size.workers // max(around.nodes, 1))
        places = [("GPU memory", size.device, size.per_gpu, around.device), ("memory", size.memory, here, around.memory),
                  ("/tmp", size.scratch, here, around.scratch)]
        notes = [_check(size, where, parts, count, room) for where, parts, count, room in places]
        checked.append(replace(size, notes=(*size.notes, *filter(None, notes))))
    _check_storage(sizes, around.disk)
    return checked


def _check(size: StageSize, where: str, parts: Parts, count: int, room: Room | None) -> str | None:
    """A note where `count` times the parts may be more than there is; None where they fit."""
    if room is None or not parts:
        return None
    need = total(parts) * count
    have = size_text(Range.of(room.bytes))
    of = f"{count} workers on one need" if count > 1 else "a worker needs"
    if need.low > room.bytes:
        name, amount = max(parts.items(), key=lambda part: part[1].low)
        verb = "take" if name.split()[0].endswith("s") else "takes"
        raise InputError(f"{size.name}: {of} {size_text(Range.of(need.low))} of {where} or more, {room.what} {have}; {name} "
                         f"{verb} {size_text(Range.of(amount.low * count))} of it: "
                         f"{_advice(size.name.split()[0], name, where, count, room)}")
    if need.high > room.bytes:
        return f"may not fit: {of} up to {size_text(Range.of(need.high))} of {where}, {room.what} {have}"
    return None


def _check_storage(sizes: list[StageSize], room: Room | None) -> None:
    if room is None:
        return
    needs = {size.name: max(total(size.storage).low - size.stored, 0) for size in sizes if size.storage}
    if (need := sum(needs.values())) <= room.bytes:
        return
    name = max(needs, key=lambda key: needs[key])
    part = max(next(size for size in sizes if size.name == name).storage.items(), key=lambda one: one[1].low)[0]
    raise InputError(f"{name}: needs about {size_text(Range.of(need))} of storage or more, {room.what} "
                     f"{size_text(Range.of(room.bytes))}; most of it are {part}: {_storage_advice(name.split()[0], room)}")


def _storage_advice(stage: str, room: Room) -> str:
    others = {"distill": "lower prompts.count, or set distill.features=held_out and train.features=online",
              "train": "lower train.drafters.NAME.num_heads or train one drafter at a time (train.only)",
              "batch": "answer fewer rows at a time (batch.limit)"}
    return f"{others.get(stage, 'do less at a time')}, or set {room.setting or 'storage'}"


def _advice(stage: str, part: str, where: str, count: int, room: Room) -> str:
    """What to change, by what needs most."""
    section = {"batch": "serve", "load": "serve"}.get(stage, stage)
    fewer = "serve.replicas" if section == "serve" else f"{section}.workers.count"
    ways = []
    if part in ("weights", "weights in the widest format", "weights while they are loaded", "the whole base"):
        ways.append(NOT_SPLIT if count == 1 else f"lower {fewer}" if where == "memory" else f"raise {section}.workers.gpus")
    elif part == "keys and values":
        ways.append(f"lower {section}.max_batch_size" if section in ("serve", "distill") else "lower the batch sizes")
        ways.append("base.context_limit")
    elif part in ("optimizer", "gradients", "buffers of a step"):
        ways.append("raise train.zero_stage, train.workers.count or lower num_heads of the drafter")
    elif part == "activations":
        ways.append("raise train.accumulate or lower train.rows_per_step")
    elif count > 1:
        ways.append(f"lower {fewer}")
    else:
        ways.append("use a larger machine")
    if where == "memory" and room.setting:
        ways.append(f"set {room.setting}")
    return " or ".join(ways)
