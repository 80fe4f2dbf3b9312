"""The application: replicas that decode, and an OpenAI-compatible ingress in front of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib import metadata
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from pipelines.serve.admission import SPARE_REQUESTS, bodies_at_once
from pipelines.serve.api_keys import check_required
from pipelines.serve.ingress import Ingress
from pipelines.serve.messages import AppArgs
from pipelines.serve.openai.errors import RETRY_SECONDS
from pipelines.serve.replica import DecodeServer
from pipelines.serve.replica_states import REPORT_SECONDS
from pipelines.serve.router import StatesRouter
from pipelines.serve.user_config import heads_of, without_heads

BEHIND = 2
"""Requests that a replica holds for each slot of its batch: one decodes and one waits, since Serve looks for a free replica
only twice a second. All others wait in front of the replicas, for the one that has room first."""
HEALTH_SECONDS = 2.0
"""Between two health checks of a replica; Serve replaces it after three failed ones."""
LOGS = LoggingConfig(encoding="JSON", enable_access_log=False)


def build(args: AppArgs, environments: dict[str, Any] | None = None, restored: bool = False) -> serve.Application:
    """An unstarted application.

    The number of replicas follows the answers in flight, between `replicas` and `max_replicas`; the target for each replica is
    its batch size. The heads are Serve's `user_config`, and the keys that of the front: where only they change, the replicas
    stay. `environments`: the runtime environment of each deployment of a running application, by name; an update has to keep
    them, or Serve would replace the replicas; `restored`: as `Heads.restored`. Raises InputError where keys are required and none
    is given.
    """
    check_required(args.require_keys, bool(args.api_key_digests))
    fixed = without_heads(args)
    most = max(args.replicas, args.max_replicas or 0)
    scale = {"num_replicas": args.replicas} if most == args.replicas else {"autoscaling_config": AutoscalingConfig(
        min_replicas=args.replicas, max_replicas=most, target_ongoing_requests=args.max_batch_size)}
    outer = BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS)
    router: dict[str, Any] = {"request_router_class": f"{StatesRouter.__module__}:{StatesRouter.__name__}",
                              "request_routing_stats_period_s": REPORT_SECONDS}

    def options(name: str, **resources: float) -> dict[str, Any]:
        return {**resources, "runtime_env": _environment() if environments is None else environments[name]}

    server = serve.deployment(DecodeServer).options(
        name="DecodeServer", **scale, max_ongoing_requests=BEHIND * args.max_batch_size, user_config=heads_of(args, restored),
        ray_actor_options=options("DecodeServer", num_cpus=args.cpus, num_gpus=args.gpus),
        request_router_config=RequestRouterConfig(**router),
        graceful_shutdown_timeout_s=args.drain_seconds, health_check_period_s=HEALTH_SECONDS, logging_config=LOGS)
    keys = {"api_key_digests": list(args.api_key_digests)}
    front = serve.deployment(Ingress).options(
        name="Ingress", max_ongoing_requests=args.room * most + bodies_at_once(args) + SPARE_REQUESTS,
        max_queued_requests=SPARE_REQUESTS, backpressure_config=outer, user_config=keys,
        ray_actor_options=options("Ingress", num_cpus=0),  # replicas may reserve every CPU that there is
        graceful_shutdown_timeout_s=args.drain_seconds, logging_config=LOGS)
    version = _version(fixed)
    return _fixed(front, version).bind(_fixed(server, version).bind(fixed), fixed)


def _environment() -> dict[str, Any]:
    """This process's runtime environment, which Serve would take too. Written out, it can be read back by an update."""
    return dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}


def _version(args: AppArgs) -> str:
    """Identifies what does not change while an application runs, the version of this package included."""
    text = json.dumps([metadata.version("hydra-heads"), asdict(args)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fixed(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """`deployment` with a version of our own: Serve draws a random one at each deployment, and would replace every replica
    where only the heads changed."""
    return deployment.options(version=version, _internal=True)
