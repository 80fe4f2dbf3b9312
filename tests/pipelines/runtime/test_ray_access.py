"""Joining a Ray cluster with and without a token, and the folders of one that is started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hydra_core.errors import InputError, StoppedError
from pipelines.runtime import ray_access
from pipelines.runtime.ray_access import CLUSTER_ID, prepare_to_join, prepare_to_start, private_folder, worker_environment
from tests.conftest import ROOT

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_ADDRESS", "TMPDIR")
START = """
import sys
from pipelines.config import load_config
from pipelines.runtime.ray_cluster import ensure_ray
with ensure_ray(load_config(None, {"storage": "/"})):
    import ray
    print(ray.get_runtime_context().gcs_address, ray._private.worker.global_worker.node.get_session_dir_path(), flush=True)
    sys.stdin.read()
"""
JOIN = """
import sys
from pipelines.config import load_config
from pipelines.runtime.ray_cluster import ensure_ray, environment_options
config = load_config(None, {"storage": "/", "ray_address": sys.argv[1]})
with ensure_ray(config):
    import os, ray
    task = ray.remote(num_cpus=0)(lambda: os.environ.get("HF_HOME")).options(**environment_options(config))
    print(ray.get(task.remote()), ray.get_runtime_context().runtime_env)
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and none of the variables that say where Ray and its token are."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where a token may lie too
    return tmp_path


def gcs(tokens: set[str]) -> tuple[grpc.Server, str]:
    """A server that answers the first call of a client, of one with a token of `tokens` alone unless that is empty."""
    def answer(_: bytes, context: Any) -> bytes:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if tokens and given.removeprefix("Bearer ") not in tokens:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    service, _, method = CLUSTER_ID.strip("/").rpartition("/")
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        service, {method: grpc.unary_unary_rpc_method_handler(answer)}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, f"127.0.0.1:{port}"


@pytest.fixture
def open_cluster() -> Iterator[str]:
    server, address = gcs(set())
    yield address
    server.stop(None)


@pytest.fixture
def locked_cluster() -> Iterator[str]:
    server, address = gcs({"right"})
    yield address
    server.stop(None)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the tokens lay that Ray was told to use."""
    found: list[str] = []
    monkeypatch.setattr(ray_access, "_use_token", found.append)
    return found


def save_token(home: Path, text: str) -> Path:
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_the_token_of_the_home_is_used_where_the_cluster_wants_one(home: Path, used: list[str], locked_cluster: str) -> None:
    path = save_token(home, "right\n")
    prepare_to_join(locked_cluster, "ray_address")
    assert used == [str(path)]


def test_no_token_is_used_where_the_cluster_has_none(home: Path, used: list[str], open_cluster: str) -> None:
    save_token(home, "right")
    prepare_to_join(open_cluster, "ray_address")
    assert used == []


def test_the_token_of_the_environment_comes_first(home: Path, used: list[str], locked_cluster: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    save_token(home, "of another cluster")
    (home / "given").write_text("right")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "given"))
    prepare_to_join(locked_cluster, "ray_address")
    assert used == [str(home / "given")]


@pytest.mark.parametrize(("token", "mode", "words"), [
    (None, None, r"ray_address=.*: this cluster wants a token, and there is none in .*/\.ray/auth_token: export RAY_AUTH_TOKEN"),
    ("wrong", None, r"ray_address=.*: this cluster wants another token than that of .*/\.ray/auth_token: export RAY_AUTH_TOKEN"),
    ("right", "disabled", r"ray_address=.*: this cluster wants a token: unset RAY_AUTH_MODE, which is disabled")])
def test_what_to_export_is_one_line(home: Path, locked_cluster: str, monkeypatch: pytest.MonkeyPatch, token: str | None,
                                    mode: str | None, words: str) -> None:
    monkeypatch.setattr(ray_access, "SYSTEM_FOLDERS", ())  # where this user may have one
    if token:
        save_token(home, token)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(InputError, match=words):
        prepare_to_join(locked_cluster, "ray_address")


def test_a_mode_that_the_cluster_does_not_have(home: Path, open_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(InputError, match=r"RAY_ADDRESS=.*: this cluster has no token authentication, .*: unset RAY_AUTH_MODE"):
        prepare_to_join(open_cluster, "RAY_ADDRESS")


def test_an_address_where_no_cluster_answers(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StoppedError, match=f"RAY_ADDRESS={address}: no Ray cluster answers there"):
            prepare_to_join(address, "RAY_ADDRESS")
    with pytest.raises(StoppedError, match=f"ray_address={address}: no Ray cluster answers there .*refused"):
        prepare_to_join(address, "ray_address")


@pytest.mark.parametrize("address", ["auto", "localhost", "http://127.0.0.1:8265"])
def test_addresses_of_another_form_are_left_to_ray(home: Path, address: str) -> None:
    prepare_to_join(address, "ray_address")


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_token_is_for_this_user_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_to_start()
    path = home / ".ray" / "auth_token"
    assert len(path.read_text()) == 64 and mode_of(path) == 0o600 and mode_of(path.parent) == 0o700
    before = path.read_text()
    path.chmod(0o644)
    path.parent.chmod(0o755)
    prepare_to_start()
    assert path.read_text() == before and mode_of(path) == 0o600 and mode_of(path.parent) == 0o700


@pytest.mark.parametrize("kind", ["none", "a file"])
def test_without_a_home_the_token_lies_in_rays_folder(home: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "none":
        def no_home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", no_home)
    else:
        (home / "file").write_text("")
        monkeypatch.setenv("HOME", str(home / "file"))
    monkeypatch.setattr(ray_access, "private_folder", lambda: home / "ray-1")
    (home / "ray-1").mkdir()
    prepare_to_start()
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert path == home / "ray-1" / "auth_token" and len(path.read_text()) == 64 and mode_of(path) == 0o600


def test_rays_folder_is_private_and_short(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    monkeypatch.setattr(ray_access, "BELOW", 0)
    monkeypatch.setenv("RAY_TMPDIR", str(home / "t"))
    (home / "t" / f"ray-{os.getuid()}").mkdir(mode=0o755)
    assert private_folder() == home / "t" / f"ray-{os.getuid()}" and mode_of(private_folder()) == 0o700
    monkeypatch.setattr(ray_access, "BELOW", 70)
    long = home / ("a" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert private_folder() == Path(f"/tmp/ray-{os.getuid()}")


def test_no_folder_for_ray_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_access, "_why_not_private", lambda folder: f"{folder} belongs to another user")
    with pytest.raises(StoppedError, match=r"no folder for the files of Ray among /.* \(/.* belongs to another user\).*export"):
        private_folder()


@pytest.mark.parametrize("place", ["RAY_TMPDIR", "SYSTEM_FOLDERS"])
def test_a_token_is_found_wherever_one_is_made(home: Path, used: list[str], locked_cluster: str, monkeypatch: pytest.MonkeyPatch,
                                               place: str) -> None:
    """That of a user without a home lies in Ray's folder, which is the first one that can be written."""
    folder = home / "else" / f"ray-{os.getuid()}"
    folder.mkdir(parents=True)
    (folder / "auth_token").write_text("right")
    if place == "RAY_TMPDIR":
        monkeypatch.setenv(place, str(home / "else"))
    else:
        monkeypatch.setattr(ray_access, place, (str(home / "else"),))
    prepare_to_join(locked_cluster, "ray_address")
    assert used == [str(folder / "auth_token")]


def test_what_killed_processes_left_is_removed_after_a_day(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions of Ray and checkpoints; not those of a process that lives, of today, or of another name."""
    monkeypatch.setattr(ray_access, "private_folder", lambda: home / "ray-1")
    old, dead = time.time() - 2 * 24 * 3600, 4_999_999  # above the largest id that Linux gives
    names = {f"ray-1/r/session_2026-01-31_10-00-00_000001_{dead}": False,
             f"ray-1/r/session_2026-01-31_10-00-00_1_{os.getpid()}": True, "ray-1/r/mine": True,
             "hydra-heads-checkpoint-abc": False, "other": True}
    young = [home / f"ray-1/r/session_2026-02-01_10-00-00_000001_{dead}", home / f"ray-1/r/session_2026-02-02_10-00-00_1_{dead}",
             home / "hydra-heads-checkpoint-now"]
    for folder in (*(home / name for name in names), *young):
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "raylet.out").write_text("")
        for path in (folder / "logs" / "raylet.out", folder / "logs", folder):
            os.utime(path, (old, old))
    os.utime(young[0] / "logs" / "raylet.out")
    os.utime(young[1])
    os.utime(young[2])
    prepare_to_start()
    assert {name: (home / name).exists() for name in names} == names and all(path.exists() for path in young)


def test_what_workers_of_another_cluster_are_given(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ray_access.TRAVEL:
        monkeypatch.delenv(name, raising=False)
    assert worker_environment("host:6379") == {}
    for name in ("HF_HOME", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HYDRA_HEADS_API_KEYS", "HYDRA_HEADS_STORAGE"):
        monkeypatch.setenv(name, f"of {name}")
    assert worker_environment("host:6379") == {"env_vars": {name: f"of {name}" for name in ("HYDRA_HEADS_STORAGE", "HF_HOME")}}
    assert worker_environment(None) == {}  # they inherit all


@pytest.mark.slow
def test_a_fresh_shell_joins_what_another_process_has_started(home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), "HOME": str(home), "TMPDIR": str(home / ("long" * 30))}
    os.mkdir(environment["TMPDIR"])
    first = subprocess.Popen([sys.executable, "-c", START], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        address, session = first.stdout.readline().split()
        assert mode_of(Path(session).parents[1]) == 0o700 and mode_of(home / ".ray" / "auth_token") == 0o600
        second = subprocess.run([sys.executable, "-c", JOIN, address], env=environment | {"HF_HOME": "mine"},
                                capture_output=True, text=True, timeout=120)
        # no runtime environment in either: Serve would take another one for another version of a deployment
        assert (second.returncode, second.stdout) == (0, "mine {}\n"), second.stderr
        assert "Traceback" not in second.stderr and "InvalidAuthToken" not in second.stderr
    finally:
        _, told = first.communicate(timeout=60)
    assert first.returncode == 0 and "Traceback" not in told
