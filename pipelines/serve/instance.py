"""Serve on the connected Ray cluster, and the replicas of an application on it.

A cluster has at most one Serve, which others may have started and use too.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.context import _get_global_client  # the public status knows neither address nor routes
from ray.serve.schema import ApplicationStatus

from hydra_core.errors import InputError

REPLICA_SECONDS = 60.0
"""In which the replicas of an application must answer."""


@dataclass(frozen=True)
class Instance:
    """A running Serve. `applications`: name -> (status, route or None)."""

    host: str
    port: int
    applications: dict[str, tuple[str, str | None]]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def check_room(self, name: str, route: str | None) -> None:
        """Raise InputError when an application of that name, or at that route, exists already."""
        if name in self.applications:
            raise InputError(f"serve.app_name={name}: an application of that name is {self.applications[name][0]} on this "
                             "cluster: choose another name or delete it")
        for other, (_, taken) in self.applications.items():
            if route is not None and taken == route:
                raise InputError(f"serve: application {other} answers at {route} on this cluster already: delete it or "
                                 "start another cluster")


def running_instance() -> Instance | None:
    """The cluster's Serve, None where it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    applications = client.get_serve_details()["applications"]
    return Instance(client.http_config.host, client.http_config.port, {
        name: (ApplicationStatus(values["status"]).value, values.get("route_prefix")) for name, values in applications.items()})


def start_instance(host: str, port: int) -> Instance:
    """Start Serve at `host`:`port`; 0: any free port. Raises InputError for a port in use."""
    port = bindable_port(host, port)
    try:
        serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    except BaseException:
        end_instance()
        raise
    return Instance(host, port, {})


def end_instance() -> None:
    """Shut Serve down unless an application runs on it."""
    found = running_instance()
    if found is not None and not found.applications:
        serve.shutdown()


def bindable_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises InputError when it cannot be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"serve.port={port}: cannot be bound on {host} ({error.strerror}): choose another") from None
        return int(probe.getsockname()[1])


def together(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The combined `info` of replicas: sums over all, a failure or a rejection of any, and the model of the first. During an
    update replicas differ: `configurations` lists all. Raises ValueError for no replica."""
    if not infos:
        raise ValueError("no replica answers")
    sums = {name: sum(info[name] for info in infos) for name in ("in_flight", "running", "slots")}
    rejected = next((info["rejected"] for info in infos if info["rejected"] is not None), None)
    return infos[0] | sums | {"replicas": len(infos), "failed": any(info["failed"] for info in infos), "rejected": rejected,
                              "configurations": sorted({info["configuration"] for info in infos})}


def ask_replicas(app_name: str) -> dict[str, Any]:
    """The combined `info` of all replicas of an application. Raises InputError when none answers within a minute, or when
    the application of that name is another program."""
    try:
        handle = serve.get_deployment_handle("DecodeServer", app_name)
        return together(handle.broadcast("info").results(timeout_s=REPLICA_SECONDS))
    except KeyError as missing:
        raise InputError(f"serve.app_name={app_name}: is another application, without {missing}: choose another name") from None
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"serve.app_name={app_name}: its replicas do not answer ({why}): see its log, or delete it") from None
