"""Hosts for tests: each has a network, a process table, shared memory, a `/tmp`, a home and a disk of its own.

They reach each other over a bridge and have the folders of `shared` in common, at the same paths; nothing else. Namespaces of
Linux stand for the machines, so root and iproute2 are needed. A host's own name resolves to the loopback, as many distributions
have it.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

NETWORK = "10.213.0"
DISK_MIB, SHARED_MEMORY_MIB = 2048, 512
TOOLS = ("setpriv", "unshare", "nsenter", "ip", "mount")
KEPT = 4000
"""Characters of its output that a failed command shows."""
INIT = "trap : TERM; while :; do sleep 1000 & wait; done"
"""The first process of a host: it reaps what ends, and with it everything else ends."""


@dataclass
class Host:
    """One machine. `inside`: the process whose end is the end of the machine, by its id outside."""

    name: str
    address: str
    cable: str
    inside: int
    environment: Mapping[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def enter(self) -> list[str]:
        return ["nsenter", f"--target={self.inside}", "--mount", "--uts", "--ipc", "--net", "--pid", f"--wdns={ROOT}"]

    def run(self, *command: str, seconds: float = 900.0, **more: str) -> str:
        """Standard output of a command that must succeed. `more`: environment variables."""
        done = subprocess.run([*self.enter, *command], env={**self.environment, **more}, capture_output=True, text=True,
                              timeout=seconds)
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}\n{(done.stdout + done.stderr)[-KEPT:]}"
        return done.stdout

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        """A command in the background; its end is that of the host at the latest."""
        self.started.append(subprocess.Popen([*self.enter, *command], env={**self.environment, **more}, text=True,
                                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
        return self.started[-1]

    def processes(self) -> list[psutil.Process]:
        """All processes of the host but its first one."""
        def table(pid: int) -> str:
            with suppress(OSError):  # it has just ended
                return os.readlink(f"/proc/{pid}/ns/pid")
            return ""

        own = table(self.inside)
        return [one for one in psutil.process_iter() if own and one.pid != self.inside and table(one.pid) == own]

    def kill(self) -> None:
        """Power off: every process ends at once, and the address answers no more."""
        with suppress(ProcessLookupError):
            os.kill(self.inside, signal.SIGKILL)
        self._send(signal.SIGKILL, self.started)

    def pause(self) -> None:
        """Stop the processor: nothing runs, and connections stay open."""
        self._send(signal.SIGSTOP, self.processes())

    def resume(self) -> None:
        self._send(signal.SIGCONT, [*self.processes(), *self.started])  # who waits for a stopped process is stopped too

    def _send(self, what: signal.Signals, to: Iterable[psutil.Process | subprocess.Popen[str]]) -> None:
        for one in to:
            with suppress(psutil.Error):
                one.send_signal(what)

    def cut_link(self) -> None:
        """Pull out the cable."""
        _ip("link", "set", self.cable, "down")

    def mend_link(self) -> None:
        _ip("link", "set", self.cable, "up")

    def fill_disk(self) -> None:
        """Leave no byte on the host's own disk, which `/tmp` and the home are on."""
        self.run("bash", "-c", "cat /dev/zero > /tmp/filler 2> /dev/null || true")

    def free_disk(self) -> None:
        self.run("rm", "-f", "/tmp/filler")


@contextmanager
def hosts(count: int, shared: Sequence[Path] = (), environment: Mapping[str, str] | None = None,
          disk_mib: int = DISK_MIB) -> Iterator[list[Host]]:
    """`count` hosts until the end of the block, with addresses `NETWORK`.1, .2, ...

    `shared`: folders that all see; the project, the interpreter and its packages are among them. `environment`: variables of
    every command, beside those of this process that do not tell of a Ray or a tracking server. Skips the test with a reason
    where namespaces cannot be made.
    """
    _skip_without_tools()
    common = dict.fromkeys([ROOT, Path(sys.prefix), Path(sys.base_prefix), *(path.resolve() for path in shared)])
    place = secrets.token_hex(3)  # the cables of an earlier set of hosts go a while after it
    bridge, made, processes = f"hyb{place}", list[Host](), list[subprocess.Popen[bytes]]()
    try:
        try:
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            for number in range(1, count + 1):
                processes.append(_begin())
                made.append(_join(processes[-1], number, place, list(common), environment or {}, disk_mib))
        except (OSError, subprocess.CalledProcessError) as error:  # no such right in a container
            said = getattr(error, "stderr", b"") or b""
            pytest.skip(f"hosts are network namespaces, which cannot be made here: {error} {said.decode(errors='replace')}")
        yield made
    finally:
        for host in made:
            host.kill()
        for process in processes:
            process.kill()
            process.wait()
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[None]:
    """`folder` is a disk of its own inside the block, of `mib` MiB, which `fill` fills. Skips the test as `hosts` does."""
    _skip_without_tools()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no disk can be mounted here: {error.stderr.decode(errors='replace')}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)


def fill(folder: Path) -> Path:
    """A file that leaves no byte on the disk of `folder`."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass
    return filler


def _skip_without_tools() -> None:
    if os.geteuid() != 0 or (missing := [name for name in TOOLS if shutil.which(name) is None]):
        pytest.skip("hosts are namespaces: root is needed" if os.geteuid() else f"hosts need {', '.join(missing)}")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _begin() -> subprocess.Popen[bytes]:
    """The first processes of a machine, which end with this one, however that ends."""
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork",
                             "--kill-child", "--mount-proc", "bash", "-c", INIT],
                            stdin=subprocess.DEVNULL, start_new_session=True)


def _join(process: subprocess.Popen[bytes], number: int, place: str, common: list[Path], environment: Mapping[str, str],
          disk_mib: int) -> Host:
    """Give a machine that has begun its cable, its name and its disk."""
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise OSError("unshare has ended")
        time.sleep(0.01)
    inside, cable = children[0].pid, f"hy{place}x{number}"
    dropped = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI", "TMPDIR", "XDG_CACHE_HOME")
    host = Host(f"host{number}", f"{NETWORK}.{number}", cable, inside, {
        **{key: value for key, value in os.environ.items() if key not in dropped}, "HOME": "/tmp/home", **environment,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
    _ip("link", "add", cable, "type", "veth", "peer", "name", f"{cable}i", "netns", str(inside))
    _ip("link", "set", cable, "master", f"hyb{place}")
    _ip("link", "set", cable, "up")
    subprocess.run([*host.enter[:-1], "bash", "-ec", _script(host, common, disk_mib)], check=True, capture_output=True,
                   env=host.environment)
    return host


def _script(host: Host, common: list[Path], disk_mib: int) -> str:
    """What makes the machine a place of its own. What is shared and lies in `/tmp` is carried over into the new one."""
    lines = [f"hostname {host.name}", f"ip link set {host.cable}i name cable", "ip link set lo up", "ip link set cable up",
             f"ip address add {host.address}/24 dev cable", "mount -t tmpfs tmpfs /mnt"]
    inside = [path for path in common if path.is_relative_to("/tmp")]
    for number, path in enumerate(inside):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {shlex.quote(str(path))} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o size={disk_mib}m tmpfs /tmp", "mkdir -p /tmp/home",
              f"mount -t tmpfs -o size={SHARED_MEMORY_MIB}m tmpfs /dev/shm"]
    for number, path in enumerate(inside):
        lines += [f"mkdir -p {shlex.quote(str(path))}", f"mount --move /mnt/{number} {shlex.quote(str(path))}"]
    return "\n".join([*lines, "umount /mnt", f"echo '127.0.0.1 localhost {host.name}' > /tmp/hosts",
                      "mount --bind /tmp/hosts /etc/hosts"])
