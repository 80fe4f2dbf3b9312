"""Ray Train as this project needs it: a process group on the network between the nodes, no watcher of placement groups, no
handler of interrupts, and no restart of work that cannot succeed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import psutil
import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines.runtime.faults import find_cause

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
CLEANER = "PlacementGroupCleanerCallback"


class HeadTrainer(TorchTrainer):
    """A TorchTrainer without Ray's cleaner of placement groups and without Ray's handler of interrupts, which restarts workers
    that died, and not those that stopped.

    The cleaner asks Ray's state API every second whether the controller lives. That needs a dashboard, which a local Ray does not
    have, and fails where two Rays run on one machine. A placement group ends with the job that made it anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # typed as the old trainer
        return [one for one in made if type(one).__name__ != CLEANER]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Python's own handler, which raises KeyboardInterrupt: Ray's exits with 0, stays for good, and swallows interrupts
        after the training."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = _RestartTheDead(cast(FailureConfig, self.run_config.failure_config))
        return super()._initialize_and_run_controller(  # type: ignore[misc]
            **{**arguments, "failure_policy": policy})


class _RestartTheDead(DefaultFailurePolicy):
    """Ray's policy, except for a mistake or a full disk: each restart would meet the same, after another pause and traceback."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if find_cause(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


@dataclass
class NodeTorchConfig(TorchConfig):
    """A process group on the network interface with the node's address.

    Gloo takes the interface to which the machine's name resolves. That is often the loopback, where other nodes are not.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _NodeTorchBackend


class _NodeTorchBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def choose_interface() -> None:
    """Name this node's interface to Gloo, NCCL and TensorPipe, where the user has not; runs in every worker."""
    if name := interface_of(ray.util.get_node_ip_address(), psutil.net_if_addrs()):
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, name)


def interface_of(address: str, interfaces: Mapping[str, Iterable[Any]]) -> str | None:
    """The name among `interfaces` (as `psutil.net_if_addrs` has them) that has the IP address, None where no one has it."""
    families = (socket.AF_INET, socket.AF_INET6)
    return next((name for name, found in interfaces.items() for one in found
                 if one.family in families and one.address.partition("%")[0] == address), None)
