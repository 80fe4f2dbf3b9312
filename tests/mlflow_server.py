"""A real MLflow server in a process of its own, which a test may kill and start again, and a link to it that a test may cut."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.runtime.reachability import why_unreachable

START_SECONDS = 240.0


class MlflowServer:
    """On SQLite, with artifacts that it serves itself. `address` stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}", "--workers=1",
                 f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", f"--artifacts-destination={self.folder}/artifacts",
                 "--serve-artifacts"], stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"})
        end = time.monotonic() + START_SECONDS
        while why_unreachable(f"{self.address}/health") is not None:
            assert self._process.poll() is None and time.monotonic() < end, (self.folder / "server.log").read_text()[-3000:]
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill it with all its workers, if it runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Link:
    """An address at which a server answers, until the link is cut: starting a server takes longer than mending a link."""

    def __init__(self, target: int) -> None:
        self._target, self.port = target, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._door: socket.socket | None = None
        self._open: list[socket.socket] = []

    def mend(self) -> None:
        """From now on the server answers here."""
        if self._door is None:
            self._door = socket.create_server(("127.0.0.1", self.port))
            threading.Thread(target=self._accept, args=(self._door,), daemon=True).start()

    def cut(self) -> None:
        """From now on nobody listens here, and open connections are broken."""
        if self._door is not None:
            for one in (self._door, *self._open):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
            self._door, self._open = None, []

    def _accept(self, door: socket.socket) -> None:
        with suppress(OSError):  # it was cut
            while True:
                near, _ = door.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=_forward, args=(source, target), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """A server that answers, until the end of the block."""
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
