"""Memory that an engine takes: estimated, logged and checked before it is allocated."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hydra_core.base.config_values import config_value
from hydra_core.base.model import Base
from hydra_core.decoding.scheduler import CHUNK, IDLE_TOKENS
from hydra_core.errors import InputError
from hydra_core.proposers import Drafter, kind_of

log = logging.getLogger(__name__)
GIB = 2.0 ** 30
UNLIMITED = 2**62


def cache_bytes(base: Base, drafter: Drafter | None, rows: int, slots: int, prefix_tokens: int = 0) -> int:
    """Bytes on the base's device that are kept for `rows` rows of `slots` slots: the base's keys and values, and what the drafter
    keeps. `prefix_tokens`: tokens of finished sequences whose keys and values are kept besides."""
    kind, decoder = kind_of(drafter), base.decoder
    kept = decoder.cache_bytes(1, prefix_tokens) + kind.kept_bytes(prefix_tokens)
    return decoder.cache_bytes(rows, slots) + kind.device_bytes(rows, slots) + kept


def index_bytes(drafter: Drafter | None, rows: int, slots: int) -> int:
    """Rough bytes of host memory that the drafter's indexes of `rows` texts of `slots` tokens take at most."""
    return kind_of(drafter).host_bytes(rows, slots)


def workspace_bytes(base: Base, rows: int, slots: int, nodes: int) -> int:
    """Rough estimate of the temporary bytes of a step: logits of every node, and activations and mask of a chunk of prompts."""
    config, item = base.vocabulary.config, base.dtype.itemsize
    logits = rows * nodes * base.vocab_size * (item + 4)
    inner = config_value(config, "intermediate_size") or 4 * base.vocabulary.width
    tokens = min(IDLE_TOKENS, rows * min(slots, CHUNK))
    heads = config_value(config, "num_attention_heads") or 1
    mask = tokens * slots * item * (1 + heads // (config_value(config, "num_key_value_heads") or heads))
    return int(logits + tokens * (6 * base.vocabulary.width + 3 * inner) * item + mask)


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, within the limits of this process's control groups."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def left_in_groups(membership: Path, mounted: Path) -> int:
    """Bytes that the memory limits of the process's control group and those above it leave; very many without a limit.

    `membership`: the file that names the groups (/proc/self/cgroup); `mounted`: where groups are folders. A container may see its
    own group as the uppermost one, whatever its name is outside.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    left, named = [UNLIMITED], [line.split(":", 2) for line in lines if line.count(":") >= 2]
    for kind in GROUP_KINDS:
        names = [name for _, controllers, name in named if kind.controller in controllers.split(",")]
        for top in (mounted / folder for folder in kind.folders):
            folders = {top} | {top / Path(*parts[:count]) for parts in (Path(name.lstrip("/")).parts for name in names)
                               for count in range(1, len(parts) + 1)}
            left += [kind.left(folder) for folder in folders]
    return min(left)


@dataclass(frozen=True)
class _GroupKind:
    """One version of Linux's control groups: its name in /proc/self/cgroup, where it may be mounted, and its files. `cache`: the
    entry of memory.stat for pages of files that the kernel takes back when memory is short."""

    controller: str
    folders: tuple[str, ...]
    most: str
    used: str
    cache: str

    def left(self, folder: Path) -> int:
        """What the limit of the group `folder` leaves, in bytes."""
        try:
            most, used = (int((folder / name).read_text()) for name in (self.most, self.used))
        except (OSError, ValueError):  # no such file, or "max"
            return UNLIMITED
        try:
            found = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used -= int(found.get(self.cache, 0))
        except (OSError, ValueError):
            pass
        return most - used


GROUP_KINDS = (_GroupKind("", (".", "unified"), "memory.max", "memory.current", "inactive_file"),
               _GroupKind("memory", ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


def check_memory(base: Base, drafter: Drafter | None, rows: int, slots: int, nodes: int = 1, allocated: int = 0,
                 kept: int = 0) -> None:
    """Log the memory of the caches and of a step with `nodes` nodes per sequence. `allocated`: the base's cache and the memory
    of steps with so many nodes are there already; 0: nothing is; `kept`: tokens of finished sequences that will be kept.

    Raises InputError when it exceeds what is free.
    """
    cached, temporary = cache_bytes(base, drafter, rows, slots, kept), workspace_bytes(base, rows, slots, nodes)
    if allocated:
        cached -= cache_bytes(base, None, rows, slots)
        temporary = max(temporary - workspace_bytes(base, rows, slots, allocated), 0)
    if base.device.type == "cpu":
        cached += index_bytes(drafter, rows, slots)
    free = free_bytes(base.device)
    log.info("keys and values of %d sequences x %d tokens: %.2f GiB, a step: %.2f GiB, of %.2f GiB free", rows, slots,
             cached / GIB, temporary / GIB, free / GIB)
    if cached + temporary > free:
        raise InputError(f"max_batch_size={rows}, context_limit={slots}: keys, values and indexes need {cached / GIB:.1f} GiB "
                         f"and a step {temporary / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on {base.device}: lower one of "
                         "the two")
