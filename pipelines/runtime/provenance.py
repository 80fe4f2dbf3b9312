"""The origin of an output: settings, code, versions, machine. Values that look like secrets are hidden."""

from __future__ import annotations

import filecmp
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from pipelines.config import RunConfig
from pipelines.config.section import HIDDEN

GIT_SECONDS = 20
_SECRET = re.compile(r"password|passwd|secret|api_?key|credential|(?:^|[._-])token$", re.IGNORECASE)
_USERINFO = re.compile(r"(?:(?<=http://)|(?<=https://))[^/?#\s]*@"
                       r"|(?<!http://)(?<!https://)(?<=://)(?:[^/?#\s:@\[]*:(?:[^?\s]*@|\S*@)|[^/?#\s]*@)", re.IGNORECASE)
"""User and password in an address, up to the last @ that may end them. Databases take a password with a slash; behind a web
server's name and port that is a path."""
_QUERY_SECRET = re.compile(r"(?<=[?&])([^=&#\s]*(?:password|passwd|secret|token|api_?key)[^=&#\s]*=)[^&#\s]+", re.IGNORECASE)
PACKAGES = ("hydra-heads", "torch", "ray", "deepspeed", "transformers", "mlflow", "numpy", "pyarrow")


def provenance(config: RunConfig) -> dict[str, Any]:
    """Resolved configuration with defaults, git commit (None if unknown), versions, arguments and machine."""
    return {"config": redacted(config.model_dump(mode="json", by_alias=True)), "git": _git(), "versions": _versions(),
            "argv": [_redacted_argument(argument) for argument in sys.argv],
            "python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count(),
            "processor": _processor()}


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


def _git() -> dict[str, Any] | None:
    root = Path(__file__).resolve().parents[2]
    try:
        if (root / ".git").exists():
            return _checkout(root)
        return _installed_from(metadata.distribution(PACKAGES[0]), root)
    # no git, a checkout of another user, a slow file system; a working directory that Ray unpacked
    except (OSError, subprocess.SubprocessError, metadata.PackageNotFoundError):
        return None


def _checkout(folder: Path) -> dict[str, Any]:
    return {"commit": _ask_git(folder, "rev-parse", "HEAD"), "changed": bool(_ask_git(folder, "status", "--porcelain"))}


def _installed_from(package: metadata.Distribution, root: Path) -> dict[str, Any] | None:
    """The commit that pip installed `root` from: recorded by pip (PEP 610), or that of a checkout with the same code."""
    noted = package.read_text("direct_url.json")
    if noted is None or Path(str(package.locate_file(""))).resolve() != root:
        return None
    origin = json.loads(noted)
    if "vcs_info" in origin:
        return {"commit": origin["vcs_info"]["commit_id"], "changed": False}
    folder = Path(url2pathname(urlsplit(origin["url"]).path))
    if "dir_info" not in origin or not (folder / ".git").exists():
        return None
    found = _checkout(folder)
    code = [str(file) for file in package.files or [] if file.suffix == ".py"]
    _, different, missing = filecmp.cmpfiles(folder, root, code, shallow=False)
    return found | {"changed": found["changed"] or bool(different or missing)}


def _ask_git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True,
                          timeout=GIT_SECONDS).stdout.strip()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
