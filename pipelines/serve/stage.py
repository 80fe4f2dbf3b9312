"""`serve`: an OpenAI-compatible endpoint that decodes speculatively, on Ray Serve."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve

from hydra_core.base import load_vocabulary
from hydra_core.decoding import check_heads
from hydra_core.errors import InputError, StoppedError
from hydra_core.interop import check_count, exportable
from pipelines.config import RunConfig, ServeSection
from pipelines.runtime.artifacts import RunPaths, StageResult
from pipelines.runtime.console import say
from pipelines.runtime.programs import stage_command
from pipelines.runtime.ray_cluster import ensure_ray
from pipelines.runtime.vllm import vllm_settings
from pipelines.serve.api_keys import check_required, key_digests
from pipelines.serve.deployment import build
from pipelines.serve.following import Follow
from pipelines.serve.instance import Instance, Listen, ask_front, ask_replicas, reachable, running_instance, start_instance
from pipelines.serve.messages import AppArgs
from pipelines.serve.model_identity import configuration_digest, model_digest
from pipelines.serve.owner import this_job
from pipelines.serve.recorder import Recording
from pipelines.serve.served_app import STAGE, ServedApp
from pipelines.serve.user_config import decodes_plainly, heads_of
from pipelines.serve.webhook import read_secret
from pipelines.tracking import Tracker
from pipelines.tracking.lookup import find_model

ROUTE = "/"
UPDATED_WITH = ("storage", "base.", "serve.app_name", "serve.api_keys_file", "promote.model_name", "promote.alias", "tracking.")
"""Settings that an update has to find as they are here."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = "{} is open to others and no API keys are set: anybody may send requests"
log = logging.getLogger("ray.serve")


def find_args(config: RunConfig) -> AppArgs:
    """The application that the settings describe, with `serve.model` resolved to a version and a folder. No tensor is read.

    Raises InputError for a model that is not registered, for bad API keys, and where vLLM is asked for and cannot run so.
    """
    section, model = config.serve, find_model(config, config.serve.model)
    vllm = vllm_settings(config, "serve.workers", section.workers)
    if vllm is not None and section.shared_answers:
        raise InputError("serve.shared_answers: vLLM drafts from no other answers: leave it out")
    return AppArgs(config.base.model_dump(), str(RunPaths.of(config).cache), None if model.folder is None else str(model.folder),
                   f"{model.label} in vLLM" if vllm else model.label, section.app_name, section.max_batch_size,
                   section.max_queued, section.max_new_tokens,
                   section.replicas, section.workers.cpus, section.workers.gpus, section.workers.threads, model.version,
                   max_replicas=section.max_replicas, max_prompt_tokens=section.max_prompt_tokens,
                   max_body_bytes=section.max_body_bytes, api_key_digests=key_digests(section.api_keys_file),
                   drain_seconds=section.drain_seconds, hung_seconds=section.hung_seconds,
                   request_seconds=section.request_seconds,
                   require_keys=section.require_keys, cors_origins=section.cors_origins, shared_answers=section.shared_answers,
                   prefix_cache_tokens=section.prefix_cache_tokens, vllm=None if vllm is None else asdict(vllm))


def check_args(args: AppArgs) -> AppArgs:
    """`args` with the digest of its configuration, after a check that it loads. Raises InputError for another base, for heads
    that do not load, and for those that vLLM cannot run where it is to."""
    if args.configuration is None:
        return args
    digest = configuration_digest(args.configuration)
    vocabulary = load_vocabulary(args.base["model"], dtype=args.base["dtype"], cache=Path(args.cache))
    check_heads(args.configuration, vocabulary)
    if args.vllm is not None and not decodes_plainly(args.configuration):
        check_count(args.vllm["num_speculative_tokens"], exportable(args.configuration, vocabulary).num_heads)
    return replace(args, digest=digest)


def resolve_args(config: RunConfig) -> AppArgs:
    """The application to serve, checked before anything starts. Raises InputError as `find_args` and `check_args` do, and where
    keys are required and none is given; an update keeps those of the running one."""
    args = find_args(config)
    check_required(args.require_keys and not config.serve.update, bool(args.api_key_digests))
    return check_args(args)


def with_running_settings(config: RunConfig, args: AppArgs) -> AppArgs:
    """`args` with what an endpoint alone does, and not an application that a stage starts for itself: it follows the registry,
    takes webhooks and records answers. Raises InputError for a bad secret and for a hook that cannot be used."""
    follow, record = Follow.of(config), Recording.of(config)
    if args.vllm is not None and follow is not None:
        raise InputError(f"serve.model={config.serve.model or 'the champion'}: the endpoint would follow the registry, and vLLM "
                         "keeps the heads that it has started with: set serve.follow_registry=0 and no webhook")
    return replace(args, follow=None if follow is None else asdict(follow), record=None if record is None else asdict(record),
                   webhook_secret=read_secret(config.serve.webhook_secret_file))


def build_app(args: dict[str, Any]) -> serve.Application:
    """The `import_path` of a Serve config: `args` are the fields of `AppArgs`, or `api_keys_file` for the digests of keys
    and `webhook_secret_file` for the secret.

    Raises InputError for an unknown field and for bad keys."""
    args = dict(args)
    for earlier, now in ServeSection.renamed.items():
        if earlier in args:
            say(STAGE, f"args.{earlier} is called args.{now} now")
            args.setdefault(now, args.pop(earlier))
    args["webhook_secret"] = read_secret(args.pop("webhook_secret_file", None))
    digests = {*args.pop("api_key_digests", ()), *key_digests(args.pop("api_keys_file", None))}
    args["api_key_digests"] = tuple(sorted(digests))
    args["cors_origins"] = _origins(args.get("cors_origins"))
    for name, kind in (("follow", Follow), ("record", Recording)):
        if args.get(name) is not None:
            try:
                kind(**args[name])
            except TypeError as error:
                raise InputError(f"args.{name}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from None
    known = {field.name for field in dataclasses.fields(AppArgs)}
    if unknown := sorted(set(args) - known):
        raise InputError(f"args.{unknown[0]}: unknown field; known are {', '.join(sorted(known))}")
    try:
        found = AppArgs(**args)
    except TypeError as error:
        raise InputError(f"args: {error}") from None
    instance = running_instance() if ray.is_initialized() else None
    if not found.api_key_digests and instance is not None and instance.url is not None and not _is_loopback(instance.url):
        log.warning(OPEN.format(instance.url))
    return build(found)


def _origins(given: Any) -> tuple[str, ...]:
    """Raises InputError unless `given` is a list of texts or nothing: a text is one of letters."""
    if given is None:
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(origin, str) for origin in given):
        raise InputError(f"args.cors_origins={given!r}: is no list of texts: write [https://chat.example], or ['*'] for all")
    return tuple(given)


def _is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in LOOPBACK


def start_app(config: RunConfig, args: AppArgs | None = None, route: str | None = ROUTE) -> ServedApp:
    """Start the application on the connected Ray and return when it answers. `args`: already resolved; `route` None: the
    application is reached through its handle alone.

    It ends with this process, however that ends. A cluster has one Serve: where it runs already, the application joins it at
    its address. Raises InputError for a port in
    use, and for a name or route that another application has.
    """
    args = replace(args or resolve_args(config), owner=this_job())
    if route is None:
        args = replace(args, require_keys=False)  # nobody can ask over HTTP
    section = config.serve
    listen = Listen(section.host, section.port, section.tls_keyfile, section.tls_certfile)
    shared = running_instance()
    if shared is not None and shared.url is None and not shared.applications:  # left by a job that needed no HTTP
        serve.shutdown()
        shared = None
    if shared is not None:
        shared.check_room(args.app_name, route)
        if route and section.port and listen.url != shared.url:
            say(STAGE, f"Serve runs on this cluster already, at {shared.url}: serve.host, serve.port and serve.tls_* "
                       f"({listen.url}) have no effect")
    instance = shared or start_instance(None if route is None else listen)
    app = ServedApp(args.app_name, reachable(instance.url or ""), args.label, shared is None, args.drain_seconds)
    try:
        serve.run(build(args), name=args.app_name, route_prefix=route)
        ask_replicas(args.app_name)
    except BaseException:
        app.remove()
        raise
    return app


def run_serve(config: RunConfig) -> StageResult:
    """Serve until SIGINT or SIGTERM, then stop the application; either signal while it starts is an interrupt.

    With `serve.update` a running application gets other heads instead. Raises InputError for the user's mistakes.
    """
    tracker = Tracker.open(config)
    args = resolve_args(config)
    if not config.serve.update:
        args = with_running_settings(config, args)
    if config.serve.update:
        with ensure_ray(config), tracker.start(STAGE, params=serving_params(args)) as run:
            app = update_app(args)
        return StageResult(STAGE, run.run_id, {"url": app.url}, {"model": app.label, "version": args.version})
    _warn(config, args)
    with ensure_ray(config), _signals() as told, ExitStack() as running:
        app = start_app(config, args)
        running.callback(app.stop, told.hurry)
        told.started.set()
        with tracker.start(STAGE, params=serving_params(args)) as run:
            _tell_addresses(config, app)
            while not told.stopped.wait(1.0):
                pass
            running.close()  # before the tracking server is told, which may take its time
    return StageResult(STAGE, run.run_id, {"url": app.url}, {"model": app.label})


def _tell_addresses(config: RunConfig, app: ServedApp) -> None:
    """Say where the application answers, how its heads are changed, and where its metrics are."""
    say(STAGE, f"{app.label} answers at {app.url}, for example\n"
               f"  curl {app.url}/v1/chat/completions -H 'Content-Type: application/json' -d "
               f"'{{\"model\": \"{app.name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'")
    address = f"ray_address={ray.get_runtime_context().gcs_address}"
    say(STAGE, f"to change the heads while it runs: {stage_command(config, STAGE, UPDATED_WITH, '--update', address)}")
    say(STAGE, f"metrics for Prometheus: {', '.join(metrics_addresses())}")


def metrics_addresses() -> list[str]:
    """Where Ray exports metrics: one address a node."""
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes() if node["Alive"]]


def _warn(config: RunConfig, args: AppArgs) -> None:
    """Say what others on the network may do with an endpoint that is open to them."""
    section = config.serve
    if section.host in LOOPBACK:
        return
    if not args.api_key_digests:
        say(STAGE, OPEN.format(f"serve.host={section.host}"))
    elif section.tls_certfile is None:
        say(STAGE, f"serve.host={section.host} is open to others and API keys travel there in clear text: set serve.tls_keyfile "
                   "and serve.tls_certfile, or put a proxy with TLS in front")


def update_app(args: AppArgs) -> ServedApp:
    """Give the running application of that name the heads of `args`, and its keys where it has any; its other settings, its
    address and its replicas stay.

    Raises InputError when no such application runs, when it has another base, and when a replica rejects the heads: the
    application then keeps the earlier ones, and its keys. Raises StoppedError while no replica runs.
    """
    name, instance = args.app_name, _instance_with(args.app_name)
    asked, before = model_digest(args), ask_replicas(name)
    if asked.base != before["base"]:
        raise InputError(f"serve.update: {name} runs base {before['base']}, the heads are for {asked.base}: only "
                         "heads can be changed; start another application for another base")
    state, application, url = ask_front(name), instance.applications[name], reachable(instance.url or "")
    if not state["replicas"]:
        raise StoppedError(f"serve.update: no replica of {name} runs at this moment: try again when {url}/ready says ready")
    running = replace(state["args"], **state["replicas"][0]["heads"], api_key_digests=state["api_key_digests"])
    wanted = replace(running, configuration=args.configuration, label=args.label, version=args.version, digest=args.digest,
                     api_key_digests=args.api_key_digests or running.api_key_digests)

    def deploy(args: AppArgs, restored: bool) -> dict[str, Any]:
        serve.run(build(args, application.environments, restored), name=name, route_prefix=application.route)
        return ask_replicas(name, tried=heads_of(args, restored))

    after = deploy(wanted, restored=False)
    if after["rejected"] is not None and after["configurations"] != [asked.configuration]:
        deploy(running, restored=True)  # or a new replica would start with the rejected ones
        raise InputError(f"serve.update: {args.label} was rejected, {after['label']} stays: {after['rejected']['reason']}")
    return ServedApp(name, url, args.label, alone=False)


def _instance_with(name: str) -> Instance:
    instance = running_instance()
    if instance is None or name not in instance.applications:
        raise InputError(f"serve.update: no application {name} runs on this cluster: start it, or set ray_address= to the "
                         "cluster on which it runs")
    return instance


def serving_params(args: AppArgs) -> dict[str, Any]:
    """The params that a tracked run of the application records."""
    return {"serves": {"label": args.label, "version": args.version, **asdict(model_digest(args))}}


@dataclass(frozen=True)
class _Told:
    """What signals have told. `started`: set by the caller; `stopped`: by SIGINT and SIGTERM from then on; `hurry`: by another
    one."""

    started: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _signals() -> Iterator[_Told]:
    """SIGINT and SIGTERM as events, once `started` is set; before that they raise KeyboardInterrupt.

    Use it only while connected to a cluster: on connecting, Ray sets a handler that aborts the process.
    """
    told = _Told()

    def handle(*_: Any) -> None:
        if not told.started.is_set():
            raise KeyboardInterrupt
        (told.hurry if told.stopped.is_set() else told.stopped).set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
