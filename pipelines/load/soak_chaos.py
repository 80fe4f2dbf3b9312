"""What happens to an application during a soak: its replicas are killed and its heads are swapped; its memory is watched."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from hydra_core.base import BaseIdentity, resolve_base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError, StoppedError
from pipelines.serve.messages import AppArgs
from pipelines.serve.model_identity import configuration_digest
from pipelines.serve.stage import update_app

REPLICA, FRONT = "DecodeServer", "Ingress"
SETTLED = 0.25
"""Share of a process's samples that are not judged: it still fills its caches and its heap."""
LEAST_MINUTES = 4.0
"""Of samples that are judged, below which a slope says nothing."""


@dataclass
class Memory:
    """Resident memory of the application's processes over time: (role, process id) -> [(seconds, bytes)]."""

    samples: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=dict)

    def sample(self, seconds: float, app_name: str) -> None:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                line = " ".join(child.cmdline())
                role = next((role for role in (REPLICA, FRONT) if f"ServeReplica:{app_name}:{role}" in line), None)
                if role:
                    self.samples.setdefault((role, child.pid), []).append((seconds, child.memory_info().rss))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each process: its memory in MiB at the start and the end of what is judged, and the slope in MiB a
        minute, None for a process that did not live long enough; `mib`: at each minute of its life, which tells a high-water
        mark that is reached from a leak."""
        found: list[dict[str, Any]] = []
        for (role, pid), samples in self.samples.items():
            judged = samples[int(SETTLED * len(samples)):]
            minutes = (judged[-1][0] - judged[0][0]) / 60
            slope = None
            if minutes >= LEAST_MINUTES:
                times, sizes = np.array(judged).T
                slope = round(float(np.polyfit(times / 60, sizes / 2**20, 1)[0]), 3)
            found.append({"role": role, "pid": float(pid), "minutes": round(minutes, 2),
                          "first_mib": round(judged[0][1] / 2**20, 1), "last_mib": round(judged[-1][1] / 2**20, 1),
                          "mib_per_minute": slope, "mib": _by_minute(samples)})
        return found


def _by_minute(samples: Sequence[tuple[float, int]]) -> list[float]:
    """The first sample of each minute in MiB."""
    firsts: dict[int, int] = {}
    for seconds, size in samples:
        firsts.setdefault(int((seconds - samples[0][0]) // 60), size)
    return [round(size / 2**20, 1) for size in firsts.values()]


class Chaos:
    """Kills and swaps on the application of `args`, whose Ray this process is connected to. `spare`: the replica that is not
    killed any more, so that its memory can be watched."""

    def __init__(self, args: AppArgs, folder: Path, draws: random.Random) -> None:
        self.args, self.draws = args, draws
        self.choices = [args, replace(args, configuration=None, label="plain", version=None, digest=None), _ngram(args, folder)]
        self.serves = 0
        self.spare: str | None = None
        self.events: dict[str, int] = {}

    def replicas(self) -> list[str]:
        """Names of the replicas' actors, oldest first as far as they are known."""
        prefix = f"SERVE_REPLICA::{self.args.app_name}#{REPLICA}#"
        return sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)
                      if actor["name"].startswith(prefix))

    def keep_one(self) -> None:
        """From now on one of the replicas that run is spared."""
        if self.spare not in (names := self.replicas()):
            self.spare = names[0] if names else None

    def kill(self) -> None:
        names = [name for name in self.replicas() if name != self.spare]
        if not names:
            return
        with contextlib.suppress(ValueError):  # it has ended by itself
            ray.kill(ray.get_actor(self.draws.choice(names), namespace="serve"))
            self._count("kills")

    def swap(self) -> None:
        """Give the application other heads. While a replica is being replaced an update may be refused, by Serve's own error
        too, which is told."""
        self.serves = (self.serves + self.draws.randint(1, len(self.choices) - 1)) % len(self.choices)
        try:
            update_app(self.choices[self.serves])
            self._count("swaps")
        except (InputError, StoppedError, RuntimeError):
            self._count("swaps_refused")

    def _count(self, name: str) -> None:
        self.events[name] = self.events.get(name, 0) + 1


def _ngram(args: AppArgs, folder: Path) -> AppArgs:
    """The same application with n-gram drafts, whose configuration is written to `folder`."""
    resolved = resolve_base(args.base["model"], Path(args.cache))
    identity = BaseIdentity(resolved.name, resolved.digest, args.base["dtype"])
    save_configuration(folder, DecodingConfiguration("ngram", "ngram", identity))
    return replace(args, configuration=str(folder), label="ngram", version=None, digest=configuration_digest(folder))
