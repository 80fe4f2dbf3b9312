"""Where steps are timed: the machine whose times count, and how a task gets there."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.config import RunConfig
from pipelines.runtime.artifacts import claimed_by, remove_content
from pipelines.runtime.console import say
from pipelines.runtime.files import write_text
from pipelines.runtime.hardware import UNKNOWN, Hardware, request_of, this_hardware
from pipelines.runtime.ray_cluster import cluster_address, ensure_ray, measuring_resources

HARDWARE = "hardware.json"
"""Beside what was timed: the machine."""


@dataclass(frozen=True)
class MeasuringPlace:
    """The machine that a task with `options` (of Ray, besides `measuring_resources`) runs on."""

    hardware: Hardware
    options: dict[str, Any] = field(default_factory=dict)

    def record(self, folder: Path) -> Path:
        """Write the machine beside what is timed; returns the file."""
        write_text(folder / HARDWARE, json.dumps(self.hardware.to_json(), indent=2))
        return folder / HARDWARE


@contextmanager
def measuring_place(config: RunConfig) -> Iterator[MeasuringPlace]:
    """The machine that what these settings time is timed on, inside the block.

    It is this one, where a local Ray is started for it. A cluster is joined: a task with the same needs is asked where it runs,
    and the tasks that measure are bound to that node, so that its machine is the one that fingerprints name.
    """
    if cluster_address(config) is None:
        yield MeasuringPlace(this_hardware())
        return
    with ensure_ray(config):
        node, hardware = ray.get(ray.remote(_here).options(**measuring_resources(config)).remote())
        yield MeasuringPlace(hardware, {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)})


def measured_on(folder: Path) -> str:
    """The label of the machine on which what lies in `folder` was timed."""
    try:
        return str(json.loads((folder / HARDWARE).read_text(encoding="utf-8"))["label"])
    except (OSError, ValueError, KeyError, TypeError):
        return UNKNOWN


def leave_times_of_another_machine(stage: str, folder: Path, wanted: str, place: MeasuringPlace,
                                   earlier: Collection[str] = ()) -> None:
    """Remove what lies in `folder`, whose lock this process holds, if it answers the same request on another machine, and say so:
    the fingerprint `wanted` names this one.

    `earlier`: fingerprints that earlier versions, which did not name the machine, gave to the same request.
    """
    owner = claimed_by(folder)
    if owner is not None and owner != wanted and (owner in earlier or request_of(owner) == request_of(wanted)):
        say(stage, f"{folder} was measured on another machine ({measured_on(folder)}): it is measured again on this one "
            f"({place.hardware.label})")
        remove_content(folder)


def _here() -> tuple[str, Hardware]:
    return ray.get_runtime_context().get_node_id(), this_hardware()
