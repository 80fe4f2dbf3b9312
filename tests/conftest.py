"""Shared fixtures: tiny bases, one Ray for all tests of a process, a storage root for each test; and how tests are shared out.

Whole files are shared out among two processes or more (pytest-xdist, `--dist loadfile`): a module-scoped fixture is made once,
and tests of one file never run at the same time. Each process has a Ray, an MLflow and temporary folders of its own.

Short tests come first, then files with slow tests: the whole chain before all, the others in another order each time. Of tests
marked `drawn`, which take minutes, a run takes two of a file, and begins none after `DRAWING_MINUTES`, and no slow test after
`SLOW_MINUTES`, so that it ends within 35 minutes: what one run leaves out another one takes. HYDRA_TEST_ALL=1 takes all.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

from hydra_core.base import Base, load_base
from tests.tiny import save_tiny
from tests.trained import noisy_copy
from tests.vllm_environment import Missing, find_vllm_python

if TYPE_CHECKING:
    from moto.server import ThreadedMotoServer

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

STARTED = time.monotonic()
DRAWING_MINUTES, SLOW_MINUTES = 20.0, 26.0
"""Minutes from the start of a run after which none of the tests that are drawn begins, and no slow test at all."""
DRAWN_AT_ONCE = 2
"""Most such tests of one file in a run."""
_drawn: dict[Path, set[str]] = {}
MOST_PROCESSES = 4  # each starts a Ray with workers that load torch: about 3 GB

os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # else a server starts seven processes more, for evaluations
torch.set_num_threads(1)  # two cores are shared with Ray workers: unset threads fight
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")  # on a busy machine it says nothing how long a drawn case takes


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for `-n auto`: one for each core, and none beside pytest's own where single files are asked for."""
    if any(Path(name.split("::")[0]).suffix == ".py" for name in config.args):
        return 0
    return min(max(2, os.cpu_count() or 1), MOST_PROCESSES)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses Ray is slow. Short files come first, then the whole chain, then the other slow files."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    order = _draw().sample(sorted(slow), len(slow))  # each process makes the same one
    places = {path: ("e2e" not in path.parts, place) for place, path in enumerate(order)}
    items.sort(key=lambda item: (item.path in slow, places.get(item.path, ())))


def _draw() -> random.Random:
    return random.Random(os.environ.get("HYDRA_TEST_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID"))


@pytest.hookimpl(tryfirst=True)  # before fixtures, which take a minute
def pytest_runtest_setup(item: pytest.Item) -> None:
    if os.environ.get("HYDRA_TEST_ALL") or item.get_closest_marker("slow") is None:
        return
    drawn = item.get_closest_marker("drawn") is not None
    if drawn and item.nodeid not in _drawn_of(item):
        pytest.skip(f"a run draws {DRAWN_AT_ONCE} tests of this file, and not this one (HYDRA_TEST_ALL=1 runs all)")
    if time.monotonic() - STARTED > 60 * (limit := DRAWING_MINUTES if drawn else SLOW_MINUTES):
        pytest.skip(f"this run has taken {limit:g} minutes and leaves this one to another (HYDRA_TEST_ALL=1 runs all)")


def _drawn_of(item: pytest.Item) -> set[str]:
    """The tests of this one's file that this run takes."""
    if item.path not in _drawn:
        names = sorted(other.nodeid for other in item.session.items
                       if other.path == item.path and other.get_closest_marker("drawn"))
        _drawn[item.path] = set(_draw().sample(names, min(DRAWN_AT_ONCE, len(names))))
    return _drawn[item.path]


@pytest.fixture(autouse=True)
def the_same_draws() -> None:
    """What a test draws from torch without a generator of its own is the same in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def the_same_loggers() -> Iterator[None]:
    """What a command of one test shows or hides of the logs is no matter of the next one."""
    loggers = [logging.getLogger(name) for name in ("hydra_core", "ray.serve")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def tiny_base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_base(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(str(tiny_base_dir), dtype="fp32", cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_draft(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A draft model that agrees with the tiny base often and not always."""
    return noisy_copy(tiny_base_dir, tmp_path_factory.mktemp("tiny-draft") / "model")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "storage"


@pytest.fixture(scope="session")
def worker_env() -> dict[str, str]:
    """Variables a Ray worker of a test needs: the project on its path, quiet libraries."""
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT), "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}  # 2 s by default: how late Ray Train sees that a worker has ended


@pytest.fixture(scope="session")
def local_ray(worker_env: dict[str, str]) -> Iterator[None]:
    """A private two-CPU Ray for the session: started by us, never a stranger's."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="warning",
                 runtime_env={"env_vars": worker_env})
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """A Python with vLLM and this project. Where there is none, an environment is made once, which takes minutes."""
    try:
        return find_vllm_python()
    except Missing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def s3_server(worker_env: dict[str, str]) -> Iterator[ThreadedMotoServer]:
    """An S3 server of this process. Its address and keys are in the environment, and in that of Ray workers."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests",
                 "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture
def s3(s3_server: ThreadedMotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket, and a cache of this test's own for what is fetched from it."""
    import s3fs

    monkeypatch.setenv("HYDRA_HEADS_CACHE", str(tmp_path / "cache"))
    bucket = f"bucket-{secrets.token_hex(4)}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def moment() -> random.Random:
    """Draws what dies and when; the seed stands in what a failed test shows, and `HYDRA_TEST_SEED` sets it."""
    seed = int(os.environ.get("HYDRA_TEST_SEED") or random.SystemRandom().randrange(10**6))
    print(f"moments drawn from HYDRA_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def shared_data() -> Path:
    """Folder of the optional evaluation data, which the project must not need."""
    if not SHARED_DATA.exists():
        pytest.skip("optional evaluation data is not on this machine")
    return SHARED_DATA
