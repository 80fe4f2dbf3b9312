"""Relative paths in settings: they are the caller's, and have no meaning inside a submitted job."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_core.bundled import BUNDLED, EARLIER
from hydra_core.errors import InputError
from hydra_core.storage import check_scheme, scheme_of, without_keys
from pipelines.config import RunConfig, load_config

PATH_FIELDS = ("prompts.path", "distill.heads", "bench.prompts", "bench.heads", "bench.vllm_python", "batch.input",
               "batch.output", "load.prompts", "compare.output", "serve.model", "generate.model", "serve.api_keys_file",
               "serve.webhook_secret_file", "loop.standing", "serve.tls_keyfile", "serve.tls_certfile", "base.model")
LINKS = ("bench.vllm_python",)
"""Of these, those that stay links: the Python of an environment is one to another Python."""
WORDS = {"serve.model": ("plain", BUNDLED, EARLIER), "generate.model": ("plain", BUNDLED, EARLIER),
         "bench.heads": (BUNDLED, EARLIER), "distill.heads": (BUNDLED, EARLIER), "train.start": (BUNDLED, EARLIER)}
"""Values of such a setting that are no path."""
URI_FIELDS = ("prompts.path", "distill.heads", "batch.input", "batch.output", "serve.model", "bench.prompts", "bench.heads",
              "load.prompts", "compare.output", "generate.model", "train.start")
"""Of these settings, those that take a URI of an object store too."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable (it really has this name) for the entry point of a submitted job."""
UNPACKED = "/runtime_resources/working_dir_files/"
"""Part of the path of every working directory that Ray unpacks."""


def with_absolute_paths(config: RunConfig, path: str | None, values: Mapping[str, Any]) -> RunConfig:
    """`config`, which was read from `path` and the overrides `values`, with every relative path made absolute.

    Raises InputError for a relative path inside a submitted job, where it would point into Ray's unpacked copy, and for a URI
    that the setting does not take.
    """
    changed = dict(values)
    for dotted in PATH_FIELDS:
        section, name = dotted.split(".")
        value = getattr(getattr(config, section), name)
        if isinstance(value, str) and not (dotted == "prompts.path" and config.prompts.source == "datasets"):
            value = _without_file_scheme(dotted, value)
            if value != getattr(getattr(config, section), name):
                changed[dotted] = value
        if isinstance(value, str) and _is_relative_path(dotted, value, config):
            changed[dotted] = _absolute(dotted, value)
    start = {name: _without_file_scheme(f"train.start.{name}", value) for name, value in config.train.start.items()}
    start = {name: _absolute(f"train.start.{name}", value) if _is_relative_path("train.start", value, config) else value
             for name, value in start.items()}
    if start != config.train.start:
        changed["train.start"] = start
    return load_config(path, changed) if changed != dict(values) else config


def inside_submitted_job() -> bool:
    """Whether this process is the entry point of a Ray job, or runs in a working directory that Ray unpacked.

    RAY_ADDRESS does not tell: people export it where they submit from.
    """
    return bool(os.environ.get(JOB_VARIABLE)) or UNPACKED in f"{Path.cwd().as_posix()}/"


def _without_file_scheme(dotted: str, value: str) -> str:
    """`value`, where `file://` has become a path. Raises InputError for a URI that the setting does not take: `s3://bucket/x` as
    a path would be a folder `s3:` in the working directory."""
    scheme = scheme_of(value)
    try:
        if scheme not in (None, "file") and not dotted.startswith(URI_FIELDS):
            raise ValueError(f"`{scheme}://` is not supported: give a path of a file system that every node sees")
        return check_scheme(value)
    except ValueError as error:
        raise InputError(f"{dotted}={without_keys(value)}: {error}") from None


def _absolute(dotted: str, value: str) -> str:
    if inside_submitted_job():
        raise InputError(f"{dotted}={value}: is a relative path, which has no meaning inside a submitted job: make it absolute")
    try:
        path = Path(value).expanduser()
        return os.path.abspath(path) if dotted in LINKS else str(path.resolve())
    except RuntimeError:
        raise InputError(f"{dotted}={value}: no such home folder: give an absolute path") from None


def _is_relative_path(dotted: str, value: str, config: RunConfig) -> bool:
    if os.path.isabs(value) or scheme_of(value) or value.startswith(("models:/", "embedded:")):
        return False
    if dotted == "base.model":
        return value.startswith((".", "~")) or value.endswith(".gguf") or Path(value).is_dir()
    if dotted == "prompts.path" and config.prompts.source == "datasets":
        return value.startswith((".", "~")) or Path(value).exists()
    return value not in WORDS.get(dotted, ())
