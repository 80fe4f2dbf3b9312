"""The commit of the running code, wherever it lies."""

from __future__ import annotations

import json
import subprocess
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from pipelines.manifests.launcher import runtime_env
from pipelines.runtime.commit import _installed_from, find_commit
from tests.conftest import ROOT


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True,
                          capture_output=True, text=True).stdout.strip()


def test_an_installed_package_names_its_commit(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    notes = site / "thing-1.dist-info"
    for folder in (source, site):
        (folder / "thing").mkdir(parents=True)
        (folder / "thing" / "code.py").write_text("a = 1\n", encoding="utf-8")
    notes.mkdir()
    (notes / "RECORD").write_text("thing/code.py,,\n", encoding="utf-8")
    package = PathDistribution(notes)
    assert _installed_from(package, site) is None  # from a registry

    git(source, "init", "-q")
    git(source, "add", ".")
    git(source, "commit", "-qm", "one")
    (notes / "direct_url.json").write_text(json.dumps({"url": source.as_uri(), "dir_info": {}}), encoding="utf-8")
    assert _installed_from(package, site) == {"commit": git(source, "rev-parse", "HEAD"), "changed": False}
    assert _installed_from(package, tmp_path) is None  # other code than pip's, such as Ray's copy of a working directory
    (source / "thing" / "code.py").write_text("a = 2\n", encoding="utf-8")
    git(source, "commit", "-qam", "two")  # after the installation
    assert _installed_from(package, site) == {"commit": git(source, "rev-parse", "HEAD"), "changed": True}

    (notes / "direct_url.json").write_text(
        json.dumps({"url": "https://host/thing", "vcs_info": {"vcs": "git", "commit_id": "c" * 40}}), encoding="utf-8")
    assert _installed_from(package, site) == {"commit": "c" * 40, "changed": False}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    (folder / "jobs").mkdir(parents=True)
    (folder / "tests").mkdir()
    for name in ("jobs/train.py", "jobs/serve.py", "tests/test_it.py"):
        (folder / name).write_text(f"# {name}\n", encoding="utf-8")
    git(folder, "init", "-q", "-b", "work")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def submitted(checkout: Path, folder: Path) -> Path:
    """What Ray makes of a checkout that is submitted with this project's runtime environment."""
    archive = folder.with_suffix(".zip")
    excludes = [*get_runtime_env_default_excludes(), *runtime_env()["excludes"]]
    create_package(str(checkout), archive, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


def test_a_submitted_copy_knows_the_commit(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    copy = submitted(checkout, tmp_path / "copy")
    assert (copy / "jobs" / "train.py").exists() and not (copy / "tests").exists()
    assert {path.name for path in (copy / ".git").iterdir()} == {"HEAD", "index", "refs"}  # no history, no addresses
    assert find_commit(copy) == {"commit": commit, "changed": None}  # nothing is seen to be changed

    git(checkout, "pack-refs", "--all")
    assert find_commit(submitted(checkout, tmp_path / "packed")) == {"commit": commit, "changed": None}
    git(checkout, "checkout", "-q", "--detach")
    assert find_commit(submitted(checkout, tmp_path / "detached")) == {"commit": commit, "changed": None}


def test_a_submitted_copy_knows_that_it_was_edited(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "tests" / "test_it.py").write_text("other\n", encoding="utf-8")  # is not sent
    assert find_commit(submitted(checkout, tmp_path / "same")) == {"commit": commit, "changed": None}
    (checkout / "jobs" / "train.py").write_text("other\n", encoding="utf-8")
    assert find_commit(submitted(checkout, tmp_path / "edited")) == {"commit": commit, "changed": True}
    git(checkout, "checkout", "-q", ".")
    (checkout / "jobs" / "new.py").write_text("new\n", encoding="utf-8")
    assert find_commit(submitted(checkout, tmp_path / "more")) == {"commit": commit, "changed": True}


def test_this_checkout_is_sent_with_its_commit(tmp_path: Path) -> None:
    if not (ROOT / ".git").is_dir():
        pytest.skip("not a checkout of its own")
    found = find_commit(submitted(ROOT, tmp_path / "copy"))
    assert found is not None and found["commit"] == git(ROOT, "rev-parse", "HEAD")
    assert found["changed"] is None or git(ROOT, "status", "--porcelain")


def test_an_image_has_its_commit_in_a_file(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    said = ["describe", "--always", "--abbrev=40", "--dirty"]
    (tmp_path / "COMMIT").write_text(git(checkout, *said) + "\n", encoding="utf-8")
    assert find_commit(tmp_path) == {"commit": commit, "changed": None}
    git(checkout, "tag", "-am", "first", "v1")
    git(checkout, "commit", "-q", "--allow-empty", "-m", "two")
    (checkout / "jobs" / "train.py").write_text("other\n", encoding="utf-8")
    (tmp_path / "COMMIT").write_text(git(checkout, *said), encoding="utf-8")
    assert find_commit(tmp_path) == {"commit": git(checkout, "rev-parse", "HEAD"), "changed": True}
    (tmp_path / "COMMIT").write_text("\n", encoding="utf-8")  # an image that was built without the argument
    assert find_commit(tmp_path) is None


def test_a_copy_without_the_index_or_of_a_linked_worktree(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    copy = submitted(checkout, tmp_path / "copy")
    (copy / ".git" / "index").write_bytes(b"no index")
    assert find_commit(copy) == {"commit": commit, "changed": None}
    git(checkout, "worktree", "add", "-q", str(tmp_path / "linked"), "-b", "other")
    assert find_commit(tmp_path / "linked") == {"commit": commit, "changed": False}
    linked = submitted(tmp_path / "linked", tmp_path / "from-linked")
    git(checkout, "worktree", "remove", "--force", str(tmp_path / "linked"))
    assert find_commit(linked) is None  # its history lies elsewhere
    (linked / "COMMIT").write_text(commit, encoding="utf-8")
    assert find_commit(linked) == {"commit": commit, "changed": None}
