"""What an engine will take, said and checked before any of it is taken."""

from __future__ import annotations

import logging

import psutil
import torch

from hydra_core.base.model import Base
from hydra_core.decoding.pending import ROOM
from hydra_core.drafters import AdaptiveDrafter, Drafter
from hydra_core.drafters.hydra_plus import HydraPlusPlus
from hydra_core.errors import InputError

log = logging.getLogger(__name__)
GIB = 2.0 ** 30


def cache_bytes(base: Base, drafter: Drafter | None, rows: int, slots: int) -> int:
    """Bytes of keys and values for `rows` rows of `slots` tokens: the base's, and a prefix layer's."""
    heads = drafter.heads if isinstance(drafter, AdaptiveDrafter) else drafter
    prefix = heads.prefix.cache_bytes(rows, slots + ROOM) if isinstance(heads, HydraPlusPlus) else 0
    return base.decoder.cache_bytes(rows, slots) + prefix


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def check_memory(base: Base, drafter: Drafter | None, rows: int, slots: int) -> None:
    """Log what the caches will take. Raises InputError when that is more than is free."""
    wanted, free = cache_bytes(base, drafter, rows, slots), free_bytes(base.device)
    log.info("keys and values of %d rows x %d tokens: %.2f GiB, of %.2f GiB free", rows, slots, wanted / GIB, free / GIB)
    if wanted > free:
        raise InputError(f"max_batch={rows}, context_limit={slots}: keys and values need {wanted / GIB:.1f} GiB, "
                         f"{free / GIB:.1f} GiB are free on {base.device}: lower one of the two")
