"""Memory that an engine takes: estimated, logged and checked before it is allocated."""

from __future__ import annotations

import logging
from pathlib import Path

import psutil
import torch

from hydra_core.base.model import Base
from hydra_core.decoding.scheduler import CHUNK, IDLE_TOKENS
from hydra_core.errors import InputError
from hydra_core.heads.hydra_plus import HydraPlusPlus
from hydra_core.proposers import AdaptiveDrafter, Drafter
from hydra_core.proposers.head_features import ROOM

log = logging.getLogger(__name__)
GIB = 2.0 ** 30


def cache_bytes(base: Base, drafter: Drafter | None, rows: int, slots: int) -> int:
    """Bytes of the KV caches of `rows` rows and `slots` slots: the base's, and that of a prefix layer."""
    heads = drafter.heads if isinstance(drafter, AdaptiveDrafter) else drafter
    prefix = heads.prefix.cache_bytes(rows, slots + ROOM) if isinstance(heads, HydraPlusPlus) else 0
    return base.decoder.cache_bytes(rows, slots) + prefix


def workspace_bytes(base: Base, rows: int, slots: int, nodes: int) -> int:
    """Rough estimate of the temporary bytes of a step: logits of every node, and activations and mask of a chunk of prompts."""
    config, item = base.vocabulary.config, base.dtype.itemsize
    logits = rows * nodes * base.vocab_size * (item + 4)
    inner = getattr(config, "intermediate_size", None) or 4 * base.vocabulary.width
    tokens = min(IDLE_TOKENS, rows * min(slots, CHUNK))
    heads = getattr(config, "num_attention_heads", None) or 1
    mask = tokens * slots * item * (1 + heads // (getattr(config, "num_key_value_heads", None) or heads))
    return int(logits + tokens * (6 * base.vocabulary.width + 3 * inner) * item + mask)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, within the limit of this process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _left_in_group(Path("/sys/fs/cgroup")))


def _left_in_group(folder: Path) -> int:
    """Bytes that a container's limit leaves; a very large number where there is no limit."""
    try:
        most, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or "max"
        return 2**62
    return most - used


def check_memory(base: Base, drafter: Drafter | None, rows: int, slots: int, nodes: int = 1, allocated: bool = False) -> None:
    """Log the memory of the caches and of a step with `nodes` nodes per sequence. `allocated`: the base's cache and the memory
    of steps are there already.

    Raises InputError when it exceeds what is free.
    """
    cached, temporary = cache_bytes(base, drafter, rows, slots), workspace_bytes(base, rows, slots, nodes)
    if allocated:
        cached, temporary = cached - cache_bytes(base, None, rows, slots), 0
    free = free_bytes(base.device)
    log.info("keys and values of %d sequences x %d tokens: %.2f GiB, a step: %.2f GiB, of %.2f GiB free", rows, slots,
             cached / GIB, temporary / GIB, free / GIB)
    if cached + temporary > free:
        raise InputError(f"max_batch_size={rows}, context_limit={slots}: keys and values need {cached / GIB:.1f} GiB and a step "
                         f"{temporary / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on {base.device}: lower one of the two")
