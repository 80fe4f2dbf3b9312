"""The hosts that tests run on are machines of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts import Host, hosts

pytestmark = pytest.mark.slow
LISTEN = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('up', flush=True)\nwhile True: s.accept()[0].close()"


def reaches(one: Host, other: Host) -> bool:
    """Whether `other` answers: it takes the connection and closes it."""
    asked = f"import socket; assert socket.create_connection(('{other.address}', 7000), 2).recv(1) == b''"
    return subprocess.run([*one.enter, sys.executable, "-c", asked], capture_output=True).returncode == 0


def test_hosts_share_a_folder_and_a_network_and_nothing_else(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with hosts(2, [shared], disk_mib=8) as (first, second):
        assert [one.run("hostname").strip() for one in (first, second)] == ["host1", "host2"]
        assert "127.0.0.1" in first.run("getent", "hosts", "host1")
        first.run("bash", "-c", f"echo seen > {shared}/file; echo own | tee /tmp/file $HOME/file /dev/shm/file")
        assert second.run("cat", f"{shared}/file") == "seen\n"
        assert "file" not in second.run("ls", "/tmp", "/tmp/home", "/dev/shm")

        listening = second.start(sys.executable, "-c", LISTEN)
        assert listening.stdout is not None and listening.stdout.readline() == "up\n"
        assert reaches(first, second) and not reaches(second, first)
        second.cut_link()
        assert not reaches(first, second)
        second.mend_link()
        assert reaches(first, second)

        first.fill_disk()
        with pytest.raises(AssertionError, match="No space left"):
            first.run("bash", "-c", "echo more > /tmp/more")
        second.run("bash", "-c", "echo more > /tmp/more")
        first.free_disk()
        first.run("bash", "-c", "echo more > /tmp/more")

        (python,) = [one for one in second.processes() if one.name().startswith("python")]
        second.pause()
        assert not reaches(first, second) and python.status() == psutil.STATUS_STOPPED
        second.resume()
        assert reaches(first, second)
        second.kill()
        listening.wait(30)
        until = time.monotonic() + 30
        while python.is_running() and time.monotonic() < until:
            time.sleep(0.05)
        assert not python.is_running() and not reaches(first, second)
    assert not any(one.processes() for one in (first, second))
