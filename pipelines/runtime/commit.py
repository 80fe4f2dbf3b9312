"""The commit of the running code: of a checkout, of an installation, of an image, or of a submitted copy of a checkout."""

from __future__ import annotations

import filecmp
import functools
import hashlib
import json
import os
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

GIT_SECONDS = 20
DISTRIBUTION = "hydra-heads"
COMMIT_FILE = "COMMIT"
"""Beside the packages in an image, which is built without `.git`: what `git describe --always --abbrev=40 --dirty` says."""
ROOT = Path(__file__).resolve().parents[2]
_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DESCRIBED = re.compile(rf"(?:.*-g)?({_SHA.pattern})(-dirty)?")
PACKAGES = ("hydra_core", "pipelines", "jobs")


@functools.cache
def this_commit() -> dict[str, Any] | None:
    """That of the code that this process runs, which git is asked for once."""
    return find_commit(ROOT)


def find_commit(root: Path) -> dict[str, Any] | None:
    """`commit`, and `changed`: whether the code differs from it, None where that cannot be told. None: an unknown commit."""
    git = root / ".git"
    try:
        if git.is_dir() and not (git / "objects").exists():
            return _submitted(root)
        if git.exists() and (found := _checkout(root)) is not None:
            return found
        if (root / COMMIT_FILE).is_file():
            return _described((root / COMMIT_FILE).read_text(encoding="utf-8"))
        return _installed_from(metadata.distribution(DISTRIBUTION), root)
    # no git, a checkout of another user, a slow file system
    except (OSError, subprocess.SubprocessError, metadata.PackageNotFoundError, ValueError):
        return None


def _checkout(folder: Path) -> dict[str, Any] | None:
    """None where git does not know the folder: the `.git` of a linked worktree that was copied elsewhere."""
    try:
        return {"commit": _ask_git(folder, "rev-parse", "HEAD"), "changed": bool(_ask_git(folder, "status", "--porcelain"))}
    except subprocess.CalledProcessError:
        return None


def _described(text: str) -> dict[str, Any] | None:
    """Of what `git describe` or `git rev-parse HEAD` says. The latter does not tell whether anything is changed, nor does the
    former without `--dirty`."""
    found = _DESCRIBED.fullmatch(text.strip())
    return {"commit": found[1], "changed": True if found[2] else None} if found else None


def _submitted(root: Path) -> dict[str, Any] | None:
    """Of a copy that Ray made of a checkout. `.git` holds the names and the index alone (`manifests.launcher`), not the history:
    an edited or a new file is seen, one that was staged is not."""
    if (commit := _head(root / ".git")) is None:
        return None
    return {"commit": commit, "changed": True if _differs_from_index(root) else None}


def _head(git: Path) -> str | None:
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head if _SHA.fullmatch(head) else None
    name = head.removeprefix("ref: ")
    if (git / name).is_file():
        return (git / name).read_text(encoding="utf-8").strip()
    packed = git / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def _differs_from_index(root: Path) -> bool:
    """Whether a file of the packages is another than the one in the index, or a module is not in it; False if it is unreadable.
    Files that were not sent do not count."""
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # else its import fails on machines without git
    from git.index.fun import read_cache

    try:
        with (root / ".git" / "index").open("rb") as file:
            entries = read_cache(file)[1]
    except Exception:  # none was sent, or it is of a kind that the library does not read
        return False
    known = {str(path): entry.binsha for (path, stage), entry in entries.items()
             if stage == 0 and str(path).split("/")[0] in PACKAGES and len(entry.binsha) == hashlib.sha1().digest_size}
    modules = {str(path.relative_to(root)) for package in PACKAGES for path in (root / package).rglob("*.py")}
    return bool(known) and (bool(modules - known.keys()) or any(
        _blob(root / name) != binsha for name, binsha in known.items() if (root / name).is_file()))


def _blob(path: Path) -> bytes:
    """git's digest of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).digest()


def _installed_from(package: metadata.Distribution, root: Path) -> dict[str, Any] | None:
    """The commit that pip installed `root` from: recorded by pip (PEP 610), or that of a checkout with the same code."""
    noted = package.read_text("direct_url.json")
    if noted is None or Path(str(package.locate_file(""))).resolve() != root:
        return None
    origin = json.loads(noted)
    if "vcs_info" in origin:
        return {"commit": origin["vcs_info"]["commit_id"], "changed": False}
    folder = Path(url2pathname(urlsplit(origin["url"]).path))
    if "dir_info" not in origin or not (folder / ".git").exists() or (found := _checkout(folder)) is None:
        return None
    code = [str(file) for file in package.files or [] if file.suffix == ".py"]
    _, different, missing = filecmp.cmpfiles(folder, root, code, shallow=False)
    return found | {"changed": found["changed"] or bool(different or missing)}


def _ask_git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True,
                          timeout=GIT_SECONDS).stdout.strip()
