"""Whether the storage of a run can be used, asked before anything is computed: by this process, and by every node."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path, is_of_client, is_passing, is_remote, try_writing
from pipelines.config import RunConfig
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.files import remove_file, write_text

READ = {"distill": ("prompts.path", "distill.heads"), "batch": ("batch.input", "serve.model"), "serve": ("serve.model",),
        "bench": ("bench.prompts", "bench.heads"), "load": ("load.prompts",), "generate": ("generate.model",),
        "quickstart": ("prompts.path",), "loop": ("prompts.path", "serve.model", "loop.standing")}
"""Stage -> settings of what it reads, beside the storage."""
WRITTEN = {"batch": ("batch.output",)}
READERS = ("compare", "generate", "serve")
"""Stages that write nothing to the storage."""
NODE_SECONDS = 120.0
"""For which the nodes are waited for: a worker process must be started on each."""


def check_stores(config: RunConfig, stage: str) -> None:
    """Ask every object store that the settings of `stage` name, once. Raises InputError, with the field, for a bucket that is
    missing and for credentials that are missing or refused; StoppedError for a store that does not answer."""
    writes = () if stage in READERS else ("storage", *WRITTEN.get(stage, ()))
    reads = (*(("storage",) if stage in READERS else ()), *READ.get(stage, ()))
    for field, place in _places(config, writes):
        _ask(field, place, partial(try_writing, place))
    for field, place in _places(config, reads):
        _ask(field, place, place.exists)


def check_every_node(field: str, place: Path, options: dict[str, Any]) -> None:
    """Raise InputError, with the node and the path, unless every node of the cluster that this process has joined can read what
    is written to `place` here, and write there. `field`: the setting that names it; `options`: of Ray for a task. A cluster of
    one node is not asked.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    key = secrets.token_hex(4)
    probe = place / f".probe-{key}"
    write_text(probe, key)
    try:
        tasks = {ray.remote(why_unseen).options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), **options,
        ).remote(str(probe), key): address for node, address in nodes.items()}
        _raise_for_blind(f"{field}={place}", tasks)
    finally:
        remove_file(probe)


def _raise_for_blind(shown: str, tasks: dict[Any, str]) -> None:
    import ray

    answered, silent = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_SECONDS)
    for task in answered:
        try:
            why = ray.get(task)
        except ray.exceptions.RayError:  # the node has left in between, and gets no work
            continue
        if why is not None:
            raise InputError(f"{shown}: the node {tasks[task]} does not see it ({why}): mount the same folder there, or give "
                             "every node the credentials of the store")
    if silent:
        say("storage", f"{shown}: {', '.join(tasks[task] for task in silent)} did not say within {NODE_SECONDS:.0f} s whether "
                       "the node sees it")


def why_unseen(probe: str, key: str) -> str | None:
    """Why a node cannot use the storage in which `probe` was written with the text `key`; None: it can."""
    path = as_path(probe)
    try:
        if path.read_text(encoding="utf-8") != key:
            return "another file is there"
        mine = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
        write_text(mine, key)
        remove_file(mine)
    except Exception as error:  # every file system and store has exceptions of its own
        return first_line(error)[:200]
    return None


def _places(config: RunConfig, fields: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    for field in fields:
        value = _value(config, field)
        if value and is_remote(value):
            yield field, as_path(value)


def _value(config: RunConfig, field: str) -> str | None:
    if field in ("batch.input", "batch.output"):
        return config.batch.source if field == "batch.input" else config.batch.target
    section, _, name = field.partition(".")
    found = getattr(config, section)
    return getattr(found, name) if name else found


def _ask(field: str, place: Path, ask: Callable[[], object]) -> None:
    try:
        ask()
    except StoppedError:
        raise
    except Exception as error:
        if (why := why_refused(error)) is not None:
            raise InputError(f"{field}={place}: {why}") from None
        if is_passing(error):
            raise StoppedError(f"{field}={place}: the store does not answer ({first_line(error)[:200]}): correct the address, or "
                               "run the same command again when it does") from None
        raise


def why_refused(error: BaseException) -> str | None:
    """What the user can do about an error of an object store that waiting does not mend; None for another error."""
    if isinstance(error, PermissionError):
        return (f"the store refuses access ({first_line(error)[:200]}): correct the credentials in the environment, or what they "
                "may do there")
    if isinstance(error, FileNotFoundError):
        return f"no such bucket ({first_line(error)[:200]}): create it, or correct the URI"
    if "Credentials" in type(error).__name__ and is_of_client(error):
        return f"no credentials are found ({first_line(error)[:200]}): set them in the environment, or give the machine a role"
    return None
