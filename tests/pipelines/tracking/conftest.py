"""Real stores for the tests of tracking: SQLite, and PostgreSQL where Debian's package is installed; and MLflow's server."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SERVER_SECONDS = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of an empty database of a PostgreSQL server of this session's own."""
    pytest.importorskip("psycopg2")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed here")
    commands, user = found[-1].parent, []
    folder = Path(tempfile.mkdtemp(prefix="hydra-postgresql-"))
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("there is no user `postgres` here, and PostgreSQL refuses to run as root")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data, port = folder / "data", free_port()
    run = lambda *words: subprocess.run([*user, *words], check=True, capture_output=True, timeout=SERVER_SECONDS)  # noqa: E731
    run(str(commands / "initdb"), "-D", str(data), "-U", "tests", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(str(commands / "pg_ctl"), "-D", str(data), "-w", "-t", str(int(SERVER_SECONDS)), "-l", str(folder / "log"), "-o", options,
        "start")
    try:
        yield f"postgresql+psycopg2://tests@127.0.0.1:{port}/postgres"
    finally:
        run(str(commands / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a store of MLflow: each kind in turn."""
    return f"sqlite:///{tmp_path}/mlflow.db" if request.param == "sqlite" else str(request.getfixturevalue("postgresql"))


@pytest.fixture
def mlflow_server() -> Iterator[Callable[[str], str]]:
    """Starts MLflow's own server on a store, and gives its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(uri: str) -> str:
        port = free_port()
        started.append(subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port",
                                         str(port), "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + SERVER_SECONDS
        while not _answers(f"{address}/health"):
            assert started[-1].poll() is None and time.monotonic() < deadline, "MLflow's server does not start"
            time.sleep(0.2)
        return address

    yield start
    for process in started:
        with _ended(process):
            process.terminate()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    yield
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
