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


class PostgreSQL:
    """A server with an empty database, which a test may stop and start again."""

    def __init__(self, commands: Path, folder: Path, user: list[str]) -> None:
        self.port, self._commands, self._folder, self._user = free_port(), commands, folder, user
        self.address = f"postgresql+psycopg2://tests@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-U", "tests", "--auth=trust", "--no-sync")

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync=off"
        self._run("pg_ctl", "-w", "-t", str(int(SERVER_SECONDS)), "-l", str(self._folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """End it at once, with every connection."""
        self._run("pg_ctl", "-m", "immediate", "stop")

    def _run(self, command: str, *words: str) -> None:
        subprocess.run([*self._user, str(self._commands / command), "-D", str(self._folder / "data"), *words], check=True,
                       capture_output=True, timeout=SERVER_SECONDS)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    """A PostgreSQL server of this session's own."""
    pytest.importorskip("psycopg2")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed here")
    folder, user = Path(tempfile.mkdtemp(prefix="hydra-postgresql-")), []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("there is no user `postgres` here, and PostgreSQL refuses to run as root")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    server = PostgreSQL(found[-1].parent, folder, user)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql(postgresql_server: PostgreSQL) -> str:
    """The address of its database."""
    return postgresql_server.address


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a store of MLflow: each kind in turn."""
    return f"sqlite:///{tmp_path}/mlflow.db" if request.param == "sqlite" else str(request.getfixturevalue("postgresql"))


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Starts MLflow's own server on a store, and gives its address. Artifacts lie below `tmp_path`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(uri: str) -> str:
        port = free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port), "--workers", "1"]
        started.append(subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
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
