"""A Ray cluster on hosts of their own: a head without workers, workers, an MLflow server, and a client that submits jobs."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.hosts import NETWORK, Host, hosts

RAY = str(Path(sys.executable).parent / "ray")
MEMORY = "--object-store-memory=150000000"
DASHBOARD, MLFLOW, STORE = 8265, 5000, 9000
SERVERS = f"{NETWORK}.2"
"""The host of MLflow and of the object store."""
BUCKET = "s3://bucket"
STORE_VARIABLES = {"AWS_ENDPOINT_URL": f"http://{SERVERS}:{STORE}", "AWS_ACCESS_KEY_ID": "tests",
                   "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
START_SECONDS, JOB_SECONDS = 240.0, 900.0
ASK = """
import os, sys, urllib.request as r
asked = r.Request(sys.argv[1], headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(r.build_opener(r.ProxyHandler({})).open(asked, timeout=60).read().decode())
"""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass
class Cluster:
    """`servers`: the host of MLflow and of whatever else is asked over the network; `client`: a host that is no part of Ray;
    `spares`: machines that nothing runs on yet."""

    head: Host
    workers: list[Host]
    servers: Host
    client: Host
    cpus: int
    spares: list[Host] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.head.address}:6379"

    @property
    def jobs(self) -> str:
        """The address for `ray job submit`."""
        return f"http://{self.head.address}:{DASHBOARD}"

    @property
    def tracking(self) -> str:
        return f"http://{self.servers.address}:{MLFLOW}"

    def start_head(self) -> None:
        self.head.run(RAY, "start", "--head", f"--node-ip-address={self.head.address}", "--port=6379", "--num-cpus=0",
                      "--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD}", "--disable-usage-stats", MEMORY)

    def start_worker(self, host: Host) -> None:
        host.run(RAY, "start", f"--address={self.address}", f"--node-ip-address={host.address}", f"--num-cpus={self.cpus}",
                 "--disable-usage-stats", MEMORY)

    def replace(self, dead: Host) -> Host:
        """A new machine in place of a dead one, as an autoscaler or an operator would start it."""
        fresh = self.spares.pop()
        self.workers = [one for one in self.workers if one is not dead] + [fresh]
        self.start_worker(fresh)
        return fresh

    def replace_head(self) -> None:
        """A new head after the death of the last one, with the workers that are left. Their Ray ends by itself in a minute; the
        operator does not wait for that."""
        self.head = self.spares.pop()
        self.start_head()
        for host in self.workers:
            host.run(RAY, "stop", "--force")
            self.start_worker(host)

    def start_mlflow(self) -> None:
        home = "/tmp/home"
        self._serve("-m", "mlflow", "server", "--host=0.0.0.0", f"--port={MLFLOW}", "--workers=1",
                    f"--backend-store-uri=sqlite:///{home}/mlflow.db", f"--artifacts-destination={home}/artifacts",
                    "--serve-artifacts", "--allowed-hosts=*", "--disable-security-middleware")
        until(lambda: answers(self.client, f"{self.tracking}/health"), START_SECONDS)

    def _serve(self, *words: str) -> None:
        """Start a Python server. Its log goes to a file: a pipe that nobody reads would fill, and stop it."""
        self.servers.start("bash", "-c", 'exec "$@" >> /tmp/servers.log 2>&1', "-", sys.executable, *words)

    def start_store(self) -> None:
        """An S3 server with an empty bucket `BUCKET`, for which every host has keys."""
        self._serve("-m", "moto.server", "--host=0.0.0.0", f"--port={STORE}")
        until(lambda: answers(self.client, STORE_VARIABLES["AWS_ENDPOINT_URL"]), START_SECONDS)
        self.ask("import s3fs; s3fs.S3FileSystem().mkdir(sys.argv[1])", BUCKET)

    def ask(self, lines: str, *words: str) -> str:
        """What a few lines of Python print on the client. `sys` is imported, and `words` are its arguments."""
        return self.client.run(sys.executable, "-c", f"import sys; {lines}", *words)

    def submit(self, stage: str, *settings: str) -> str:
        """Submit `python -m jobs.STAGE` from the client, as the cluster page says; returns the job's id."""
        job = f"job{secrets.token_hex(4)}"
        self.client.run(RAY, "job", "submit", f"--address={self.jobs}", f"--submission-id={job}", "--no-wait",
                        f"--working-dir={ROOT}", f"--runtime-env={ROOT / 'cluster' / 'runtime_env.yaml'}", "--",
                        "python", "-m", f"jobs.{stage}", *settings)
        return job

    def status(self, job: str) -> str:
        return str(self._ask(f"/api/jobs/{job}")["status"])

    def log(self, job: str) -> str:
        return str(self._ask(f"/api/jobs/{job}/logs")["logs"])

    def _ask(self, path: str) -> dict[str, Any]:
        """What the dashboard tells the client; `ray job status` takes seconds to start."""
        return json.loads(self.client.run(sys.executable, "-c", ASK, self.jobs + path))

    def wait(self, job: str, seconds: float = JOB_SECONDS) -> str:
        """The log of a job that must succeed."""
        until(lambda: self.status(job) in ENDED, seconds, pause=2.0)
        log = self.log(job)
        assert self.status(job) == "SUCCEEDED", log[-6000:]
        return log

    def result(self, stage: str, *settings: str) -> dict[str, Any]:
        """The JSON line of a submitted job that must succeed."""
        return json_line(self.wait(self.submit(stage, *settings)))


def json_line(log: str) -> dict[str, Any]:
    (line,) = [line for line in log.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    return found


def answers(host: Host, url: str, seconds: float = 5.0) -> bool:
    """Whether `url` answers with a status below 400 when it is asked from `host`."""
    asked = f"import urllib.request as r; r.build_opener(r.ProxyHandler({{}})).open({url!r}, timeout={seconds}).read()"
    with suppress(AssertionError):
        host.run(sys.executable, "-c", asked, seconds=seconds + 20)
        return True
    return False


def until(holds: Callable[[], bool], seconds: float, pause: float = 0.5) -> None:
    """Wait until `holds()`, at most `seconds`; fail then."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds:g} s"
        time.sleep(pause)


@contextmanager
def ray_cluster(shared: list[Path], workers: int = 2, cpus: int = 2, spares: int = 0, store: bool = False) -> Iterator[Cluster]:
    """A running cluster with token authentication, and an MLflow server, until the end of the block.

    `shared`: folders that all hosts see; `cpus`: of each worker, the head has none; `store`: start an object store besides.
    Skips the test where hosts cannot be made.
    """
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
             "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
             "XDG_CACHE_HOME": str(Path.home() / ".cache"),  # what is compiled: a minute on each host
             **(STORE_VARIABLES if store else {})}
    with hosts(workers + 3 + spares, shared, given) as (head, servers, client, *others):
        cluster = Cluster(head, others[:workers], servers, client, cpus, others[workers:])
        cluster.start_head()
        for host in cluster.workers:
            cluster.start_worker(host)
        cluster.start_mlflow()
        if store:
            cluster.start_store()
        yield cluster
