"""Serve on the connected Ray cluster, and the applications on it.

A cluster has at most one Serve, which others may have started and use too.
"""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client  # the public status knows neither address nor routes
from ray.serve.schema import ApplicationStatus

from hydra_core.errors import InputError, StoppedError
from pipelines.runtime.faults import first_line
from pipelines.serve.replica_states import together

REPLICA_SECONDS = 60.0
"""In which the front of an application must answer, and its replicas tell what they decode."""
POLL_SECONDS = 0.2
EVERYWHERE = "0.0.0.0"
"""The host of who listens at all addresses of a machine: an address for nobody to ask at."""
FRONT, DECODER = "Ingress", "DecodeServer"


@dataclass(frozen=True)
class Application:
    """`route`: None: reached by handles alone; `environments`: of each deployment, by its name, the runtime environment."""

    status: str
    route: str | None
    environments: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Instance:
    """A running Serve. `url`: None: it listens nowhere."""

    url: str | None
    applications: dict[str, Application] = field(default_factory=dict)

    def check_room(self, name: str, route: str | None) -> None:
        """Raise InputError when an application of that name, or at that route, exists already, and when there is to be a route
        and Serve listens nowhere."""
        if name in self.applications:
            raise InputError(f"serve.app_name={name}: an application of that name is {self.applications[name].status} on this "
                             "cluster: choose another name or delete it")
        for other, application in self.applications.items():
            if route is not None and application.route == route:
                raise InputError(f"serve: application {other} answers at {route} on this cluster already: delete it or "
                                 "start another cluster")
        if route is not None and self.url is None:
            raise InputError(f"serve: Serve runs on this cluster without HTTP, for {', '.join(self.applications)}: wait until "
                             "that has ended or start another cluster")


@dataclass(frozen=True)
class Listen:
    """Where Serve listens; `port` 0: any free one. With `keyfile` and `certfile` it speaks https."""

    host: str
    port: int
    keyfile: str | None = None
    certfile: str | None = None

    @property
    def url(self) -> str:
        return f"{'http' if self.certfile is None else 'https'}://{self.host}:{self.port}"

    def check_certificate(self) -> None:
        """Raise InputError for files that are not a certificate and its key."""
        if self.certfile is None or self.keyfile is None:
            return
        for name, path in (("tls_certfile", self.certfile), ("tls_keyfile", self.keyfile)):
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise InputError(f"serve.{name}={path}: cannot be read ({error.strerror})") from None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certfile, self.keyfile, password="")
        except (ssl.SSLError, ValueError) as error:
            raise InputError(f"serve.tls_certfile={self.certfile}: is not a certificate of serve.tls_keyfile={self.keyfile}, "
                             f"both PEM and without a password ({error})") from None


def running_instance() -> Instance | None:
    """The cluster's Serve, None where it does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    details, http = client.get_serve_details(), client.http_config
    listens = details.get("proxy_location") not in (None, ProxyLocation.Disabled, ProxyLocation.Disabled.value)
    scheme = "http" if http.ssl_certfile is None else "https"
    return Instance(f"{scheme}://{http.host}:{http.port}" if listens else None, {
        name: Application(ApplicationStatus(values["status"]).value, values.get("route_prefix"), {
            deployment: ((found["deployment_config"] or {}).get("ray_actor_options") or {}).get("runtime_env") or {}
            for deployment, found in (values.get("deployments") or {}).items()})
        for name, values in details["applications"].items()})


def reachable(url: str) -> str:
    """`url` as others reach it. A Serve that listens everywhere has a proxy on the head node and on each one with a replica."""
    parts = urlsplit(url)
    if parts.hostname != EVERYWHERE:
        return url
    return f"{parts.scheme}://{ray.get_runtime_context().gcs_address.rpartition(':')[0]}:{parts.port}"


def start_instance(listen: Listen | None) -> Instance:
    """Start Serve; None: it listens nowhere. Raises InputError for a port in use, and a certificate that cannot be used."""
    if listen is None:
        options, url = {}, None
    else:
        listen.check_certificate()
        port = bindable_port(listen.host, listen.port)
        options = {"host": listen.host, "port": port, "ssl_keyfile": listen.keyfile, "ssl_certfile": listen.certfile}
        url = replace(listen, port=port).url
    try:
        serve.start(proxy_location="Disabled" if listen is None else "EveryNode", http_options=options)
    except BaseException:
        end_instance()
        raise
    return Instance(url)


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


def ask_front(app_name: str, seconds: float = REPLICA_SECONDS) -> dict[str, Any]:
    """The `state` of an application's front, from its memory: replicas may be full. Raises StoppedError without an answer."""
    try:
        state: dict[str, Any] = serve.get_deployment_handle(FRONT, app_name).state.remote().result(timeout_s=seconds)
        return state
    except Exception as error:
        why = first_line(error)
        raise StoppedError(f"serve.app_name={app_name}: does not answer ({why}): see its log, or delete it") from None


def ask_replicas(app_name: str, tried: dict[str, Any] | None = None) -> dict[str, Any]:
    """The combined `info` of all running replicas of an application, once each has told it. `tried`: the heads that each of them
    must have tried by then.

    Raises StoppedError when that takes longer than a minute, InputError when the application of that name is another program.
    """
    instance, end = running_instance(), time.monotonic() + REPLICA_SECONDS
    found = None if instance is None else instance.applications.get(app_name)
    if found is not None and not {FRONT, DECODER} <= set(found.environments):
        raise InputError(f"serve.app_name={app_name}: is another application, without {FRONT} and {DECODER}: choose another name")
    while True:
        state = ask_front(app_name, max(1.0, end - time.monotonic()))
        infos = state["replicas"]
        if infos and len(infos) == state["running"] and (tried is None or all(info["tried"] == tried for info in infos)):
            return together(infos)
        if time.monotonic() > end:
            raise StoppedError(f"serve.app_name={app_name}: its replicas tell nothing ({len(infos)} of {state['running']} do): "
                               "see its log, or delete it")
        time.sleep(POLL_SECONDS)
