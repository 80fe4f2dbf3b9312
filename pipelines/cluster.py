"""Joining a Ray cluster, or starting a local one that ends with the stage."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from hydra_core.errors import InputError
from pipelines.config import RunConfig


@contextmanager
def ensure_ray(config: RunConfig) -> Iterator[None]:
    """Be connected to Ray inside the block.

    An already connected process (a job inside another stage, a test) is left as it is. Else the address comes from the
    config, then RAY_ADDRESS (set inside a submitted job); without either a private local instance is started, never
    `auto`, which could join a stranger's cluster, and shut down at the end. Raises InputError if an address does not
    answer.
    """
    if ray.is_initialized():
        yield
        return
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=True, logging_level="warning")
        except ConnectionError:
            raise InputError(f"ray_address={address}: no Ray cluster answers there") from None
    else:
        ray.init(address="local", include_dashboard=False, log_to_driver=True, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()
