"""Ray Train as this project needs it: a process group on the network between the nodes, no watcher of placement groups, no
restart of work that cannot succeed, a checkpoint when it is interrupted, and a line a minute while there is no room."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import psutil
import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.backend_setup import BackendSetupCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import controller as ray_controller
from ray.train.v2._internal.execution.controller.state import RunningState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import TrainAutoscalingCoordinatorClient
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines.runtime.console import say
from pipelines.runtime.faults import find_cause
from pipelines.train.elastic import FreeRoomPolicy, waiting_line
from pipelines.train.notice import LeavingError, Notice, give, listen

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
CLEANER = "PlacementGroupCleanerCallback"
LEAVE_SECONDS = 30.0
"""How long an interrupted driver waits for its workers' checkpoint: as long as Kubernetes waits for a pod."""
for talkative in (TrainAutoscalingCoordinatorClient, BackendSetupCallback):
    # Tracebacks of what is nothing: an actor that answers late and is asked again, a worker that is dead when all are ended.
    logging.getLogger(talkative.__module__).setLevel(logging.ERROR)


class HeadTrainer(TorchTrainer):
    """A TorchTrainer without Ray's cleaner of placement groups and without Ray's handler of interrupts, which restarts workers
    that died or were told to leave, and not those that stopped. An interrupt of the driver ends it after a checkpoint.

    The cleaner asks Ray's state API every second whether the controller lives. That needs a dashboard, which a local Ray does not
    have, and fails where two Rays run on one machine. A placement group ends with the job that made it anyway.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # typed as the old trainer
        return [*(one for one in made if type(one).__name__ != CLEANER), WaitingLines()]

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        """Leave Python's own handler, which raises KeyboardInterrupt: Ray's exits with 0, stays for good, and swallows interrupts
        after the training."""
        self._controller = controller

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policies: dict[str, Any] = {"failure_policy": RestartPolicy(cast(FailureConfig, self.run_config.failure_config))}
        if (scaling := cast(ScalingConfig, self.scaling_config)).elasticity_enabled:
            policies["scaling_policy"] = FreeRoomPolicy(scaling)
        try:
            return super()._initialize_and_run_controller(**{**arguments, **policies})  # type: ignore[misc]
        except KeyboardInterrupt:
            if self._controller is not None:
                _end_after_checkpoint(self._controller)
            raise


def _end_after_checkpoint(controller: Any) -> None:
    """Tell the workers to leave, and wait until they have: the same command goes on from there. A second interrupt ends it."""
    if not ray.get(controller.__ray_call__.remote(tell_to_leave)):
        return  # no worker trains yet
    say("train", f"interrupted: the running step ends with a checkpoint, at most {LEAVE_SECONDS:.0f} s from now")
    end = time.monotonic() + LEAVE_SECONDS
    with suppress(ray.exceptions.RayError):  # the controller may go first
        while time.monotonic() < end and not ray.get(controller.__ray_call__.remote(has_ended)):
            time.sleep(0.2)


def tell_to_leave(controller: Any) -> bool:
    """Runs in Ray Train's controller, which starts no workers any more; returns whether there are workers to tell."""
    controller._failure_policy.is_ending = True
    group = controller.get_worker_group()
    workers = group.get_workers() if group is not None and isinstance(controller.get_state(), RunningState) else []
    for worker in workers:
        worker.execute_async(give, Notice.LEAVE)
    return bool(workers)


def has_ended(controller: Any) -> bool:
    """Runs in Ray Train's controller."""
    return bool(controller.get_state().is_terminal())


class WaitingLines(ControllerCallback):
    """Says what the workers wait for, where Ray's controller would print a traceback.

    It asks the cluster for all of them at once, and again after `RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S` (a minute).
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        """Runs in the controller."""
        scaling = train_run_context.scaling_config

        def is_other(record: logging.LogRecord) -> bool:
            if not record.exc_info or not isinstance(record.exc_info[1], WorkerGroupStartupTimeoutError):
                return True
            say("train", waiting_line(scaling))
            return False

        ray_controller.logger.addFilter(is_other)


class RestartPolicy(DefaultFailurePolicy):
    """Ray's policy, except for a mistake or a full disk: each restart would meet the same, after another pause and traceback.
    Workers that were told to leave are no failure, and not counted as one. `is_ending`: nothing is restarted any more."""

    is_ending = False

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if self.is_ending or find_cause(training_failed_error) is not None:
            return FailureDecision.RAISE
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        if any(isinstance(getattr(failure, "_base_exc", failure), LeavingError) for failure in failures):
            return FailureDecision.RETRY
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
        worker_group.execute(listen)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Ray's controller would print a traceback for a worker that is gone, which it tells of anyway."""
        with suppress(ray.exceptions.RayActorError, ray.exceptions.RayTaskError):
            super().on_shutdown(worker_group, backend_config)


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
