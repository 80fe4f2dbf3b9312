"""The origin of an output: settings, code, versions, machine. Values that look like secrets are hidden."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import yaml

from pipelines.config import RunConfig
from pipelines.config.section import HIDDEN
from pipelines.runtime.commit import this_commit
from pipelines.runtime.hardware import this_hardware

_SECRET = re.compile(r"password|passwd|secret|api_?key|credential|(?:^|[._-])token$", re.IGNORECASE)
_USERINFO = re.compile(r"(?:(?<=http://)|(?<=https://))[^/?#\s]*@"
                       r"|(?<!http://)(?<!https://)(?<=://)(?:[^/?#\s:@\[]*:(?:[^?\s]*@|\S*@)|[^/?#\s]*@)", re.IGNORECASE)
"""User and password in an address, up to the last @ that may end them. Databases take a password with a slash; behind a web
server's name and port that is a path."""
_QUERY_SECRET = re.compile(r"(?<=[?&])([^=&#\s]*(?:password|passwd|secret|token|api_?key)[^=&#\s]*=)[^&#\s]+", re.IGNORECASE)
PACKAGES = ("hydra-heads", "torch", "ray", "deepspeed", "transformers", "mlflow", "numpy", "pyarrow")


def provenance(config: RunConfig) -> dict[str, Any]:
    """Resolved configuration with defaults, git commit (None if unknown), versions, arguments and machine."""
    machine = this_hardware()
    return {"config": redacted(config.model_dump(mode="json", by_alias=True)), "git": this_commit(), "versions": versions(),
            "argv": [_redacted_argument(argument) for argument in sys.argv],
            "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(),
            "processor": machine.cpu, "hardware": machine.to_json()}


def is_secret(name: str) -> bool:
    """Whether the value of a setting called `name` (dots allowed) must not be written anywhere. Where a secret lies, in a file or
    an environment variable, is none."""
    return bool(_SECRET.search(name)) and not name.endswith(("_file", "_variable"))


def without_credentials(text: str) -> str:
    """Remove user and password, and the secrets of the query, from `scheme://user:password@host?password=...`."""
    return _QUERY_SECRET.sub(rf"\1{HIDDEN}", _USERINFO.sub("", text)) if "://" in text else text


def redacted(value: Any) -> Any:
    """A copy of nested mappings and lists in which secrets are `HIDDEN` and addresses have no credentials."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if is_secret(str(key)) and item else redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def shareable_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML for `load_config`, with secrets hidden: it is written beside outputs."""
    return yaml.safe_dump(redacted(config.model_dump(mode="json", by_alias=True)), sort_keys=False)


def _redacted_argument(argument: str) -> str:
    name, separator, value = argument.partition("=")
    return f"{name}={HIDDEN}" if separator and value and is_secret(name) else without_credentials(argument)


def versions() -> dict[str, str | None]:
    """Version of each of `PACKAGES`, None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
