"""What a training worker is told while it trains: that it must leave, or that another number of workers is to go on.

Both end the workers after the running step and a checkpoint of it, so that no step is lost. A worker must leave when it gets
SIGTERM, when Ray drains its node (a spot machine that is reclaimed), or when the driver is stopped.
"""

from __future__ import annotations

import signal
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist


class Notice(IntEnum):
    """The more urgent one counts when workers are told different things."""

    NONE = 0
    RESIZE = 1
    LEAVE = 2


WORDS = {Notice.RESIZE: "the number of workers changes", Notice.LEAVE: "a worker must leave"}
_given = Notice.NONE


class LeavingError(Exception):
    """Ends the workers after a checkpoint: Ray starts others, which go on from it."""


def give(notice: Notice) -> None:
    """Tell the worker of this process."""
    global _given
    _given = max(_given, notice)


def listen() -> None:
    """Take the first SIGTERM for a notice; a second one does what it did before.

    Runs in the main thread of each worker; the training runs in another.
    """
    earlier = signal.getsignal(signal.SIGTERM)

    def leave(number: int, frame: Any) -> None:
        if _given != Notice.LEAVE:
            give(Notice.LEAVE)
        elif callable(earlier):
            earlier(number, frame)

    signal.signal(signal.SIGTERM, leave)


def agreed_notice(device: torch.device) -> Notice:
    """The most urgent notice of all workers. Every worker asks at the same steps."""
    told = torch.tensor(int(max(_given, _drained())), dtype=torch.int32, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX)
    return Notice(int(told))


def _drained() -> Notice:
    """What Ray's watcher of nodes has told this worker. `ray.train.get_preemption_info` would wait for the other workers in each
    step, by way of an actor."""
    from ray.train.v2._internal.execution.context import get_train_context

    return Notice.NONE if get_train_context().preemption_context.preemption_info is None else Notice.LEAVE
