"""`serve`: an OpenAI-compatible endpoint that decodes speculatively, on Ray Serve."""

from __future__ import annotations

import dataclasses
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from hydra_core.base import load_vocabulary
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError
from pipelines.cluster import ensure_ray
from pipelines.config import RunConfig
from pipelines.serving.deployment import build
from pipelines.serving.records import AppArgs
from pipelines.stage import RunPaths, StageResult
from pipelines.tracking import resolve


@dataclass(frozen=True)
class ServedApp:
    """A running application; `stop` leaves nothing of it behind."""

    name: str
    url: str
    label: str

    def stop(self) -> None:
        serve.delete(self.name)
        serve.shutdown()


def resolve_args(config: RunConfig) -> AppArgs:
    """What to serve, validated before anything starts: alias to version, configuration to base, heads to tensors.

    Raises InputError for an unknown model, another base, or heads that do not load.
    """
    paths, section = RunPaths.of(config), config.serve
    model = section.model or f"models:/{config.promote.model_name}@{config.promote.alias}"
    folder: Path | None = None
    label = "plain"
    if model.startswith("models:/"):
        version, folder = resolve(config, model, paths.cache / "models")
        label = f"models:/{config.promote.model_name}/{version}" if section.model is None else f"{model} (version {version})"
    elif model != "plain":
        folder, label = Path(model), model
    if folder is not None:
        check_heads(folder, load_vocabulary(config.base.model, dtype=config.base.dtype, cache=paths.cache))
    return AppArgs(config.base.model_dump(), str(paths.cache), None if folder is None else str(folder), label,
                   section.app_name, section.max_batch, section.max_queued, section.max_new_tokens, section.replicas,
                   section.workers.cpus, section.workers.gpus, section.workers.threads)


def build_app(args: dict[str, Any]) -> serve.Application:
    """Import path of a Serve config: `args` are `AppArgs`' fields. Raises InputError for an unknown one."""
    known = {field.name for field in dataclasses.fields(AppArgs)}
    if unknown := sorted(set(args) - known):
        raise InputError(f"args.{unknown[0]}: unknown field; known are {', '.join(sorted(known))}")
    try:
        return build(AppArgs(**args))
    except TypeError as error:
        raise InputError(f"args: {error}") from None


def start_app(config: RunConfig) -> ServedApp:
    """Start the application on the connected Ray and return once it answers. Raises InputError for a port in use."""
    args = resolve_args(config)
    host, port = config.serve.host, config.serve.port
    _check_port(host, port)
    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    try:
        serve.run(build(args), name=args.app_name, route_prefix="/")
    except BaseException:
        serve.shutdown()
        raise
    return ServedApp(args.app_name, f"http://{host}:{port}", args.label)


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"serve.port={port}: cannot be bound on {host} ({error.strerror}): choose another") from None


def run_serve(config: RunConfig) -> StageResult:
    """Serve until SIGINT or SIGTERM, then shut the application down."""
    with ensure_ray(config):
        app = start_app(config)
        try:
            print(f"serve: {app.label} answers at {app.url}, for example\n"
                  f"  curl {app.url}/v1/chat/completions -H 'Content-Type: application/json' -d "
                  f"'{{\"model\": \"{app.name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
                  file=sys.stderr, flush=True)
            _wait_for_signal()
        finally:
            app.stop()
    return StageResult("serve", None, {"url": app.url}, {"model": app.label})


def _wait_for_signal() -> None:
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(1.0):
            pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
