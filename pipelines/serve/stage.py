"""`serve`: an OpenAI-compatible endpoint that decodes speculatively, on Ray Serve."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from hydra_core.base import load_vocabulary
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from pipelines.config import RunConfig, ServeSection
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.console import say
from pipelines.runtime.ray_cluster import ensure_ray
from pipelines.serve.api_keys import key_digests
from pipelines.serve.deployment import build
from pipelines.serve.instance import REPLICA_SECONDS, Instance, ask_replicas, end_instance, running_instance, start_instance
from pipelines.serve.messages import AppArgs
from pipelines.serve.model_identity import configuration_digest, model_digest
from pipelines.tracking import Tracker
from pipelines.tracking.lookup import find_model

STAGE = "serve"
ROUTE = "/"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServedApp:
    """A running application; `stop` removes it. `alone`: Serve itself was started for it, and stops with it."""

    name: str
    url: str
    label: str
    alone: bool

    def stop(self) -> None:
        serve.delete(self.name)
        if self.alone:
            end_instance()


def find_args(config: RunConfig) -> AppArgs:
    """The application that the settings describe, with `serve.model` resolved to a version and a folder. No tensor is read.

    Raises InputError for a model that is not registered and for bad API keys.
    """
    section, model = config.serve, find_model(config, config.serve.model)
    return AppArgs(config.base.model_dump(), str(RunPaths.of(config).cache), None if model.folder is None else str(model.folder),
                   model.label, section.app_name, section.max_batch_size, section.max_queued, section.max_new_tokens,
                   section.replicas, section.workers.cpus, section.workers.gpus, section.workers.threads, model.version,
                   max_replicas=section.max_replicas, max_prompt_tokens=section.max_prompt_tokens,
                   max_body_bytes=section.max_body_bytes, api_key_digests=key_digests(section.api_keys_file),
                   drain_seconds=section.drain_seconds, hung_seconds=section.hung_seconds)


def check_args(args: AppArgs) -> AppArgs:
    """`args` with the digest of its configuration, after a check that it loads. Raises InputError for another base, and for heads
    that do not load."""
    if args.configuration is None:
        return args
    digest = configuration_digest(args.configuration)
    check_heads(args.configuration, load_vocabulary(args.base["model"], dtype=args.base["dtype"], cache=Path(args.cache)))
    return replace(args, digest=digest)


def resolve_args(config: RunConfig) -> AppArgs:
    """The application to serve, checked before anything starts. Raises InputError as `find_args` and `check_args` do."""
    return check_args(find_args(config))


def build_app(args: dict[str, Any]) -> serve.Application:
    """The `import_path` of a Serve config: `args` are the fields of `AppArgs`, or `api_keys_file` for the digests of keys.

    Raises InputError for an unknown field and for bad keys."""
    args = dict(args)
    for earlier, now in ServeSection.renamed.items():
        if earlier in args:
            say(STAGE, f"args.{earlier} is called args.{now} now")
            args.setdefault(now, args.pop(earlier))
    digests = {*args.pop("api_key_digests", ()), *key_digests(args.pop("api_keys_file", None))}
    args["api_key_digests"] = tuple(sorted(digests))
    known = {field.name for field in dataclasses.fields(AppArgs)}
    if unknown := sorted(set(args) - known):
        raise InputError(f"args.{unknown[0]}: unknown field; known are {', '.join(sorted(known))}")
    try:
        return build(AppArgs(**args))
    except TypeError as error:
        raise InputError(f"args: {error}") from None


def start_app(config: RunConfig, args: AppArgs | None = None, route: str | None = ROUTE) -> ServedApp:
    """Start the application on the connected Ray and return when it answers. `args`: already resolved; `route` None: the
    application is reached through its handle alone.

    A cluster has one Serve: where it runs already, the application joins it at its address. Raises InputError for a port in
    use, and for a name or route that another application has.
    """
    args = args or resolve_args(config)
    host, port = config.serve.host, config.serve.port
    shared = running_instance()
    if shared is not None:
        shared.check_room(args.app_name, route)
        if route and port and (host, port) != (shared.host, shared.port):
            say(STAGE, f"Serve runs on this cluster already, at {shared.url}: serve.host={host} and serve.port={port} have no "
                       "effect")
    instance = shared or start_instance(host, port)
    app = ServedApp(args.app_name, instance.url, args.label, alone=shared is None)
    try:
        serve.run(build(args), name=args.app_name, route_prefix=route)
    except BaseException:
        app.stop()
        raise
    return app


def run_serve(config: RunConfig) -> StageResult:
    """Serve until SIGINT or SIGTERM, then stop the application; either signal while it starts is an interrupt.

    With `serve.update` a running application gets other heads instead. Raises InputError for the user's mistakes.
    """
    tracker = Tracker.open(config)
    args = resolve_args(config)
    if config.serve.update:
        with ensure_ray(config), tracker.start(STAGE, params=serving_params(args)) as run:
            app = update_app(args)
        return StageResult(STAGE, run.run_id, {"url": app.url}, {"model": app.label, "version": args.version})
    if config.serve.host not in LOOPBACK and not args.api_key_digests:
        say(STAGE, f"serve.host={config.serve.host} is open to others and no API keys are set: anybody may send requests")
    with ensure_ray(config), _signals() as (started, stopped):
        app = start_app(config, args)
        started.set()
        try:
            with tracker.start(STAGE, params=serving_params(args)) as run:
                say(STAGE, f"{app.label} answers at {app.url}, for example\n"
                           f"  curl {app.url}/v1/chat/completions -H 'Content-Type: application/json' -d "
                           f"'{{\"model\": \"{app.name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'")
                say(STAGE, "to change the heads while it runs: hydra-heads serve --update "
                           f"ray_address={ray.get_runtime_context().gcs_address}")
                while not stopped.wait(1.0):
                    pass
        finally:
            app.stop()
    return StageResult(STAGE, run.run_id, {"url": app.url}, {"model": app.label})


def update_app(args: AppArgs) -> ServedApp:
    """Give the running application of that name the heads of `args`; its other settings and its replicas stay.

    Raises InputError when no such application runs, when it has another base, and when a replica rejects the heads: the
    application then keeps the earlier ones.
    """
    instance = _instance_with(args.app_name)
    asked, before = model_digest(args), ask_replicas(args.app_name)
    if asked.base != before["base"]:
        raise InputError(f"serve.update: {args.app_name} runs base {before['base']}, the heads are for {asked.base}: only "
                         "heads can be changed; start another application for another base")
    handle = serve.get_deployment_handle("DecodeServer", args.app_name)
    running = handle.broadcast("running_args").results(timeout_s=REPLICA_SECONDS)[0]
    wanted = replace(running, configuration=args.configuration, label=args.label, version=args.version, digest=args.digest)
    serve.run(build(wanted), name=args.app_name, route_prefix=ROUTE)
    after = ask_replicas(args.app_name)
    if after["rejected"] is not None and after["configurations"] != [asked.configuration]:
        serve.run(build(running), name=args.app_name, route_prefix=ROUTE)  # or a new replica would start with the rejected ones
        raise InputError(f"serve.update: {args.label} was rejected, {after['label']} stays: {after['rejected']['reason']}")
    return ServedApp(args.app_name, instance.url, args.label, alone=False)


def _instance_with(name: str) -> Instance:
    instance = running_instance()
    if instance is None or name not in instance.applications:
        raise InputError(f"serve.update: no application {name} runs on this cluster: start it, or set ray_address= to the "
                         "cluster on which it runs")
    return instance


def serving_params(args: AppArgs) -> dict[str, Any]:
    """The params that a tracked run of the application records."""
    return {"serves": {"label": args.label, "version": args.version, **asdict(model_digest(args))}}


@contextmanager
def _signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Events `started`, which the caller sets, and `stopped`, which SIGINT and SIGTERM set from then on; before that they raise
    KeyboardInterrupt.

    Use it only while connected to a cluster: on connecting, Ray sets a handler that aborts the process.
    """
    started, stopped = threading.Event(), threading.Event()

    def handle(*_: Any) -> None:
        if not started.is_set():
            raise KeyboardInterrupt
        stopped.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield started, stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
