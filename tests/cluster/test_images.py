"""The Dockerfiles: order of layers, user, what probes need, and versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.manifests.pods import USER
from tests.cluster.shipped import CLUSTER
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = [CLUSTER / "Dockerfile", CLUSTER / "Dockerfile.cuda"]
CODE = ["hydra_core", "pipelines", "jobs", "cluster"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, the rest) of each, with continued lines joined and comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_layers_user_and_tools(path: Path) -> None:
    """Dependencies before the code, and what the pods' security context and probes ask for."""
    found = instructions(path)
    texts = [f"{word} {rest}" for word, rest in found]
    assert texts[0] == "FROM python:3.11-slim"
    dependencies = next(at for at, text in enumerate(texts) if "pip install -c cluster/constraints.txt '.[cluster]'" in text)
    copied = {rest.split()[0]: at for at, (word, rest) in enumerate(found) if word == "COPY"}
    assert copied["pyproject.toml"] < dependencies and copied["cluster/constraints.txt"] < dependencies
    assert all(copied[name] > dependencies for name in CODE), "an edit of the code would install everything anew"
    assert not any(rest.startswith(". ") for word, rest in found if word == "COPY")
    assert re.search(r"apt-get install .*\bwget\b.*rm -rf /var/lib/apt/lists", " ".join(texts))
    assert f"useradd --create-home --uid {USER} hydra" in " ".join(texts) and texts[-1] == f"USER {USER}:{USER}"
    assert "WORKDIR /opt/hydra-heads" in texts and texts[-2] == "RUN pip install --no-deps -e ."


def test_the_images_hold_the_versions_of_the_project() -> None:
    """The tags of the comments and the build of torch that is installed first."""
    (torch,) = [one for one in PROJECT["dependencies"] if one.startswith("torch==")]
    cpu, cuda = (path.read_text(encoding="utf-8") for path in FILES)
    assert f'"$TORCH_INDEX" {torch};' in cpu and "TORCH_INDEX" not in cuda
    assert f"-t hydra-heads:{PROJECT['version']} " in cpu and f"-t hydra-heads-cuda:{PROJECT['version']} " in cuda


def constraints() -> dict[str, str]:
    lines = [line for line in (CLUSTER / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    return dict(line.split("==") for line in lines)


def test_constraints_fit_the_requirements() -> None:
    """A version of each dependency that pyproject.toml allows."""
    pinned = constraints()
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cluster"]):
        need = Requirement(text)
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), text


def test_constraints_name_all_that_is_needed() -> None:
    """Whatever a dependency needs, here and now, has a version there too; torch names its CUDA libraries itself."""
    todo = [Requirement(text) for text in PROJECT["dependencies"]]
    seen: set[tuple[str, frozenset[str]]] = set()
    missing = set()
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if (name, frozenset(need.extras)) in seen or re.match(r"nvidia-|cuda-|triton$", name):
            continue
        seen.add((name, frozenset(need.extras)))
        if name not in constraints():
            missing.add(name)
        try:
            inner = [Requirement(text) for text in metadata.requires(name) or ()]
        except metadata.PackageNotFoundError:
            continue
        todo += [one for one in inner if one.marker is None
                 or any(one.marker.evaluate({"extra": extra}) for extra in ("", *need.extras))]
    assert missing == set()


def test_dockerignore_lets_through_what_is_copied() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines and {line[1:] for line in lines if line.startswith("!")} == {*CODE, "pyproject.toml", "README.md"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_linter_of_dockerfiles_has_nothing_to_say(path: Path) -> None:
    """hadolint, or Docker's own check; neither comes from pip."""
    if shutil.which("hadolint"):
        command = ["hadolint", "--ignore", "DL3008", "--ignore", "DL3042", str(path)]  # Debian's versions; PIP_NO_CACHE_DIR
    elif shutil.which("docker") and subprocess.run(["docker", "buildx", "version"], capture_output=True).returncode == 0:
        command = ["docker", "build", "--check", "-f", str(path), str(ROOT)]
    else:
        pytest.skip("neither hadolint nor `docker buildx` is installed")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
