"""The application: replicas that decode, and an OpenAI-compatible ingress in front of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib import metadata

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from pipelines.serve.ingress import Ingress
from pipelines.serve.messages import AppArgs
from pipelines.serve.openai.errors import RETRY_SECONDS
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of, without_heads

SPARE_REQUESTS = 64
"""Requests that the ingress accepts beyond those in flight, to answer them with 429, or to report health."""
BEHIND = 2
"""Requests that a replica holds for each slot of its batch: one decodes and one waits, since Serve looks for a free replica
only twice a second. All others wait in front of the replicas, for the one that has room first."""
HEALTH_SECONDS = 2.0
"""Between two health checks of a replica; Serve replaces it after three failed ones."""
LOGS = LoggingConfig(encoding="JSON", enable_access_log=False)


def build(args: AppArgs) -> serve.Application:
    """An unstarted application.

    The number of replicas follows the answers in flight, between `replicas` and `max_replicas`; the target for each replica is
    its batch size. The heads are Serve's `user_config`: where only they change, the replicas stay.
    """
    fixed = without_heads(args)
    most = max(args.replicas, args.max_replicas or 0)
    scale = {"num_replicas": args.replicas} if most == args.replicas else {"autoscaling_config": AutoscalingConfig(
        min_replicas=args.replicas, max_replicas=most, target_ongoing_requests=args.max_batch_size)}
    outer = BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS)
    server = serve.deployment(DecodeServer).options(
        name="DecodeServer", **scale, max_ongoing_requests=BEHIND * args.max_batch_size, user_config=heads_of(args),
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus}, graceful_shutdown_timeout_s=args.drain_seconds,
        health_check_period_s=HEALTH_SECONDS, logging_config=LOGS)
    front = serve.deployment(Ingress).options(
        name="Ingress", max_ongoing_requests=args.room * most + SPARE_REQUESTS, max_queued_requests=SPARE_REQUESTS,
        backpressure_config=outer, ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=args.drain_seconds,
        logging_config=LOGS)
    version = _version(fixed)
    return _fixed(front, version).bind(_fixed(server, version).bind(fixed), fixed)


def _version(args: AppArgs) -> str:
    """Identifies what does not change while an application runs, the version of this package included."""
    text = json.dumps([metadata.version("hydra-heads"), asdict(args)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _fixed(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """`deployment` with a version of our own: Serve draws a random one at each deployment, and would replace every replica
    where only the heads changed."""
    return deployment.options(version=version, _internal=True)
