"""Mistakes as people make them, told by the real jobs: exit 2, one line that names the field, nothing left behind.

All run in this process, through the entry point of the command; those of `AS_COMMANDS` also in a process of their own.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hydra_core.base import Base
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from jobs.runner import run
from pipelines.config import load_config
from pipelines.runtime.artifacts import write_text
from tests.broken_heads import DAMAGES, break_heads
from tests.conftest import ROOT
from tests.pipelines.synthetic import write_distilled
from tests.tiny import save_tiny
from tests.trained import random_heads

pytestmark = pytest.mark.slow
Case = Callable[["Bench"], tuple[str, list[str]]]


class Bench:
    """Where a case finds what it needs, and a chain's first arguments."""

    def __init__(self, root: Path, base: Base, base_dir: Path, heads: Path, silent: int) -> None:
        self.root, self.base, self.base_dir, self.heads, self.silent = root, base, base_dir, heads, silent
        self.storage = root / "storage"
        self.environment: dict[str, str] = {}
        self.chain = [f"storage={self.storage}", f"base.model={base_dir}", "base.dtype=fp32"]

    def write(self, name: str, content: bytes) -> Path:
        (self.root / name).write_bytes(content)
        return self.root / name

    def distill(self, content: bytes, *more: str) -> tuple[str, list[str]]:
        return "distill", ["prompts.source=jsonl", f"prompts.path={self.write('p.jsonl', content)}", *more]

    def bench(self, damage: str) -> tuple[str, list[str]]:
        prompts = self.write("p.jsonl", b'{"prompt": "x"}\n')
        return "bench", [f"prompts={prompts}", f"heads={break_heads(self.heads, self.root / 'broken', damage)}"]


def another_run(bench: Bench) -> tuple[str, list[str]]:
    write_text(bench.storage / "runs" / "default" / "distill" / "claim.json", json.dumps({"fingerprint": "0" * 64}))
    return bench.distill(b'{"prompt": "x"}\n')


def no_compiler(bench: Bench) -> tuple[str, list[str]]:
    bench.environment["CXX"] = "no-such-compiler"
    write_distilled(load_config(None, dict(argument.split("=") for argument in bench.chain)), bench.base, train=8, held_out=4)
    return "train", []


def quickstart(bench: Bench, *more: str, **environment: str) -> tuple[str, list[str]]:
    bench.environment |= environment
    return "quickstart", list(more)


def no_template(bench: Bench) -> tuple[str, list[str]]:
    base = save_tiny(bench.root / "plain")
    (base / "chat_template.jinja").unlink()
    return "distill", ["prompts.source=self", f"base.model={base}"]


def cut_base(bench: Bench) -> tuple[str, list[str]]:
    base = save_tiny(bench.root / "cut")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    return bench.distill(b'{"prompt": "x"}\n', f"base.model={base}")


def relative_storage(bench: Bench) -> tuple[str, list[str]]:
    bench.environment["HYDRA_HEADS_STORAGE"] = "here"
    bench.chain = bench.chain[1:]
    return "distill", []


def unknown_field(bench: Bench) -> tuple[str, list[str]]:
    return "distill", ["--config", str(bench.write("c.yaml", b"distill:\n  tempratures: [0]\n"))]


GOOD = b'{"prompt": "x"}\n'
CASES: dict[str, tuple[Case, str]] = {
    "empty prompt file": (lambda b: b.distill(b""), "p.jsonl: is empty"),
    "rows without the field": (lambda b: b.distill(b'{"x": 1}\n{"y": 2}\n'), "row 1: has no field `prompt`"),
    "invalid UTF-8": (lambda b: b.distill(b'{"prompt": "\xff"}\n'), "row 1: is not UTF-8 text"),
    "half a character": (lambda b: b.distill(b'{"prompt": "\\ud800"}\n'), "row 1: prompt: holds half a character"),
    "too many bad rows": (lambda b: b.distill(GOOD + b"[]\n"), "1 of 2 rows failed, over the allowed share 0.05: row 2"),
    "unknown field": (unknown_field, "distill.tempratures: unknown field"),
    "relative storage": (relative_storage, "HYDRA_HEADS_STORAGE"),
    "another run": (another_run, "holds the `distill` output of another run"),
    "no chat template": (no_template, "prompts.source=self: the base has no chat template"),
    "truncated base": (cut_base, "base.model="),
    "context too large": (lambda b: b.distill(GOOD, "base.context_limit=257"), "base.context_limit=257"),
    "dead MLflow server": (lambda b: b.distill(GOOD, "tracking.uri=http://127.0.0.1:9"), "tracking.uri=http://127.0.0.1:9:"),
    "dead MLflow database": (lambda b: b.distill(GOOD, "tracking.uri=mysql://127.0.0.1:9/x"), "tracking.uri=mysql://127.0.0.1:9"),
    "silent MLflow server": (lambda b: b.distill(GOOD, f"tracking.uri=http://127.0.0.1:{b.silent}"), "no MLflow server answers"),
    "no prompts to bench": (lambda b: ("bench", ["prompts=/nowhere.jsonl"]), "bench.prompts=/nowhere.jsonl: no such file"),
    "no compiler": (no_compiler, "no C++ compiler (no-such-compiler)"),
    "quickstart: no compiler": (lambda b: quickstart(b, CXX="no-such-compiler"), "no C++ compiler (no-such-compiler)"),
    "quickstart: port in use": (lambda b: quickstart(b, f"serve.port={b.silent}"), "serve.port="),
    "quickstart: too few CPUs": (lambda b: quickstart(b, "train.workers.cpus=64"), "train.workers: 2 x 64.0 CPU"),
    "train before distill": (lambda b: ("train", []), "no finished `distill` here"),
} | {f"heads: {damage}": ((lambda b, damage=damage: b.bench(damage)), "bench.heads") for damage in DAMAGES}  # type: ignore[misc]


@pytest.fixture(scope="module")
def heads(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "heads"
    save_checkpoint(folder, random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    return folder


@pytest.fixture
def bench(tmp_path: Path, tiny_base: Base, tiny_base_dir: Path, heads: Path) -> Iterator[Bench]:
    with socket.socket() as silent:  # takes connections and never says a word
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        yield Bench(tmp_path, tiny_base, tiny_base_dir, heads, silent.getsockname()[1])


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def quiet_log() -> Iterator[None]:
    """Stages give the log of `hydra_core` a handler that keeps the stderr of this test."""
    log = logging.getLogger("hydra_core")
    yield
    log.handlers.clear()
    log.propagate = True


def check_mistake(status: int, out: str, err: str, words: str, expected: int = 2) -> None:
    assert (status, out) == (expected, ""), err
    told = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(told) == 1 and words in told[0], err
    assert "Traceback" not in err


def expected(name: str) -> int:
    """The exit code: a server that is down is no mistake of the user's."""
    return 1 if "MLflow" in name else 2


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_left(bench: Bench, local_ray: None, quiet_log: None, monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str], name: str) -> None:
    case, words = CASES[name]
    stage, arguments = case(bench)
    before = files(bench.storage / "runs")
    for variable in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in bench.environment.items():
        monkeypatch.setenv(variable, value)
    capfd.readouterr()
    started = time.monotonic()
    status = run(stage, [*bench.chain, *arguments])
    taken = time.monotonic() - started
    check_mistake(status, *capfd.readouterr(), words, expected(name))
    assert files(bench.storage / "runs") == before
    assert "MLflow" not in name or taken < 100, "MLflow itself would try for many minutes"


AS_COMMANDS = ("too many bad rows", "silent MLflow server")
"""One that is found in a file, and one that is found by asking another process; a third stands below."""


@pytest.mark.parametrize("name", AS_COMMANDS)
def test_the_same_of_a_process_of_its_own(bench: Bench, worker_env: dict[str, str], name: str) -> None:
    case, words = CASES[name]
    stage, arguments = case(bench)
    before = files(bench.storage / "runs")
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run([sys.executable, "-m", f"jobs.{stage}", *bench.chain, *arguments], cwd=ROOT, capture_output=True,
                          text=True, env=environment | worker_env | bench.environment)
    check_mistake(done.returncode, done.stdout, done.stderr, words, expected(name))
    assert files(bench.storage / "runs") == before


def test_a_dead_server_is_told_before_a_base_is_fetched(tmp_path: Path, worker_env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.quickstart", f"storage={tmp_path}", "tracking.uri=http://127.0.0.1:9"],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | worker_env)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "tracking.uri" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
