"""`serve`: an OpenAI-compatible endpoint that decodes speculatively, on Ray Serve."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray import serve

from hydra_core.base import load_vocabulary
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from pipelines.cluster import ensure_ray
from pipelines.config import RunConfig
from pipelines.serving.deployment import build
from pipelines.serving.identity import PLAIN, serving_of
from pipelines.serving.instance import end_instance, running_instance, start_instance
from pipelines.serving.records import AppArgs
from pipelines.stage import RunPaths, StageResult
from pipelines.tracking import Tracker, resolve

STAGE = "serve"
ROUTE = "/"


@dataclass(frozen=True)
class ServedApp:
    """A running application; `stop` leaves nothing of it behind. `alone`: Serve itself was started for it."""

    name: str
    url: str
    label: str
    alone: bool

    def stop(self) -> None:
        serve.delete(self.name)
        if self.alone:
            end_instance()


def find_args(config: RunConfig) -> AppArgs:
    """What `serve.model` stands for now: alias to version, version to folder. No tensor is read.

    Raises InputError for a model that is not registered.
    """
    paths, section = RunPaths.of(config), config.serve
    model = section.model or f"models:/{config.promote.model_name}@{config.promote.alias}"
    folder: Path | None = None
    label = PLAIN
    if model.startswith("models:/"):
        version, folder = resolve(config, model, paths.cache / "models")
        label = f"models:/{config.promote.model_name}/{version}" if section.model is None else f"{model} (version {version})"
    elif model != PLAIN:
        folder, label = Path(model), model
    return AppArgs(config.base.model_dump(), str(paths.cache), None if folder is None else str(folder), label,
                   section.app_name, section.max_batch, section.max_queued, section.max_new_tokens, section.replicas,
                   section.workers.cpus, section.workers.gpus, section.workers.threads)


def check_args(args: AppArgs) -> AppArgs:
    """`args`, once its configuration is known to load. Raises InputError for another base or heads that do not load."""
    if args.configuration is not None:
        check_heads(args.configuration, load_vocabulary(args.base["model"], dtype=args.base["dtype"], cache=Path(args.cache)))
    return args


def resolve_args(config: RunConfig) -> AppArgs:
    """What to serve, validated before anything starts. Raises InputError as `find_args` and `check_args` do."""
    return check_args(find_args(config))


def build_app(args: dict[str, Any]) -> serve.Application:
    """Import path of a Serve config: `args` are `AppArgs`' fields. Raises InputError for an unknown one."""
    known = {field.name for field in dataclasses.fields(AppArgs)}
    if unknown := sorted(set(args) - known):
        raise InputError(f"args.{unknown[0]}: unknown field; known are {', '.join(sorted(known))}")
    try:
        return build(AppArgs(**args))
    except TypeError as error:
        raise InputError(f"args: {error}") from None


def start_app(config: RunConfig, args: AppArgs | None = None) -> ServedApp:
    """Start the application on the connected Ray and return once it answers. `args`: what was resolved already.

    A cluster has one Serve: where it runs, the application joins it at the address that it has. Raises InputError for a
    port in use, or a name or route that another application has.
    """
    args = args or resolve_args(config)
    host, port = config.serve.host, config.serve.port
    shared = running_instance()
    if shared is not None:
        shared.check_room(args.app_name, ROUTE)
        if port and (host, port) != (shared.host, shared.port):
            print(f"serve: Serve runs on this cluster already, at {shared.url}: serve.host={host} and serve.port={port} have "
                  "no effect", file=sys.stderr)
    instance = shared or start_instance(host, port)
    app = ServedApp(args.app_name, instance.url, args.label, alone=shared is None)
    try:
        serve.run(build(args), name=args.app_name, route_prefix=ROUTE)
    except BaseException:
        app.stop()
        raise
    return app


def run_serve(config: RunConfig) -> StageResult:
    """Serve until SIGINT or SIGTERM, then shut the application down; either one while it starts is an interrupt."""
    tracker = Tracker.open(config)
    args = resolve_args(config)
    with ensure_ray(config), _signals() as (started, stopped):
        app = start_app(config, args)
        started.set()
        try:
            with tracker.start(STAGE, params={"serves": {"label": app.label, **asdict(serving_of(args))}}) as run:
                print(f"serve: {app.label} answers at {app.url}, for example\n"
                      f"  curl {app.url}/v1/chat/completions -H 'Content-Type: application/json' -d "
                      f"'{{\"model\": \"{app.name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
                      file=sys.stderr, flush=True)
                while not stopped.wait(1.0):
                    pass
        finally:
            app.stop()
    return StageResult(STAGE, run.run_id, {"url": app.url}, {"model": app.label})


@contextmanager
def _signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Events `started`, for the caller to set, and `stopped`, which SIGINT and SIGTERM set from then on; before it they
    raise KeyboardInterrupt.

    Inside a cluster's connection only: Ray sets a handler of its own as it connects, which aborts.
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
