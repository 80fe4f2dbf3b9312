"""Two hosts with networks of their own, whose names resolve to the loopback: one Ray cluster, one storage.

Network namespaces stand for the hosts. Nothing of one reaches the other but through the link between them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.pipelines.distill.test_stage import write_prompts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
HOSTS = ("10.213.0.1", "10.213.0.2")
SECONDS = 900.0


class Hosts:
    """`names`: of the namespaces; `environment`: of what runs there."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.names = root, [f"hydra-{os.getpid()}-{number}" for number in range(len(HOSTS))]
        dropped = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI")
        self.environment = {key: value for key, value in os.environ.items() if key not in dropped} | environment | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def link(self) -> None:
        """A network each, joined by one cable; each host's own name is the loopback, as many distributions have it."""
        ip("link", "add", f"hy{os.getpid() % 10**6}a", "type", "veth", "peer", "name", f"hy{os.getpid() % 10**6}b")
        for name, address, end in zip(self.names, HOSTS, "ab", strict=True):
            ip("netns", "add", name)
            ip("link", "set", f"hy{os.getpid() % 10**6}{end}", "netns", name, "name", "cable")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
            known = Path("/etc/netns") / name
            known.mkdir(parents=True)
            (known / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")

    def unlink(self) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, found):
                with suppress(psutil.Error):
                    psutil.Process(pid).kill()
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def run(self, host: int, *command: str) -> str:
        """Standard output of a command that must succeed on one of the hosts."""
        done = subprocess.run(["ip", "netns", "exec", self.names[host], *command], env=self.environment, capture_output=True,
                              text=True, timeout=SECONDS, cwd=self.root)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    def start_ray(self) -> str:
        """The address of a cluster with one CPU on each host."""
        ray = str(Path(sys.executable).parent / "ray")
        common = ("--num-cpus=1", "--disable-usage-stats", "--object-store-memory=200000000")
        self.run(0, ray, "start", "--head", f"--node-ip-address={HOSTS[0]}", "--port=6379", "--include-dashboard=false", *common,
                 f"--temp-dir={self.root / 'r'}")
        self.run(1, ray, "start", f"--address={HOSTS[0]}:6379", f"--node-ip-address={HOSTS[1]}", *common)
        return f"{HOSTS[0]}:6379"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts(worker_env: dict[str, str]) -> Iterator[Hosts]:
    root = Path("/tmp") / f"hy{os.getpid()}"  # Ray's sockets want a short path
    made = Hosts(root, worker_env)
    root.mkdir()
    try:
        try:
            made.link()
        except (OSError, subprocess.CalledProcessError) as error:  # no root, no iproute2, no such right in a container
            pytest.skip(f"no network namespaces can be made here: {error}")
        yield made
    finally:
        made.unlink()
        shutil.rmtree(root, ignore_errors=True)


def test_distill_and_train_on_two_hosts(hosts: Hosts, tiny_base_dir: Path, storage: Path) -> None:
    """A worker on each host. Gloo would listen on the loopback, to which the hosts' names resolve, and meet nobody there."""
    address = hosts.start_ray()
    prompts = write_prompts(storage.parent / "p.jsonl", 40)
    settings = [f"ray_address={address}", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32"]
    made = hosts.run(0, sys.executable, "-m", "jobs.distill", *settings, "prompts.source=jsonl", f"prompts.path={prompts}",
                     "prompts.count=40", "distill.max_new_tokens=24", "distill.held_out=0.2",
                     "distill.workers={count: 2, cpus: 1, threads: 1}")
    assert json.loads(made)["prompts"] == 40
    trained = hosts.run(0, sys.executable, "-m", "jobs.train", *settings, "train.drafters={hydra: {kind: hydra}}",
                        "train.max_steps=6", "train.validate_every=3", "train.validation_rows=8",
                        "train.workers={count: 2, cpus: 1, threads: 1}")
    assert json.loads(trained)["hydra"]["steps"] == 6
