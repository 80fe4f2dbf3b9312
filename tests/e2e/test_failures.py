"""Machines that die, links that are cut, clocks that differ: the work goes on, or resumes, and comes to the same rows and curves.

Everything is killed for real, at a moment that is drawn, and compared with an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from hydra_core.base import Base
from pipelines.batch.writer import read_batch_rows
from pipelines.config import RunConfig, load_config
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.schemas import FEATURES, RESPONSES
from pipelines.runtime.artifacts import RunPaths
from tests.hosts import Host, fill, small_disk
from tests.pipelines.batch.test_kills import check_answers
from tests.pipelines.distill.test_stage import write_prompts
from tests.pipelines.synthetic import write_distilled
from tests.pipelines.train.test_stage import EVERY, STEPS, curve_of, saved_steps, without_time
from tests.ray_hosts import ENDED, Cluster, json_line, ray_cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.drawn, pytest.mark.timeout(1500)]
SECONDS = 600.0
EACH = "workers={count: 2, cpus: 1, threads: 1}"
Rows = dict[str, list[dict[str, Any]]]
FAULTS = ("machine", "link", "pause")
"""It dies, its cable is cut, or it stands still. One is drawn, or HYDRA_TEST_FAULT says it."""
OUT_SECONDS = 30.0
"""How long a link is cut or a machine stands still: longer than Ray waits for it."""


class Place:
    """A cluster of three workers, and the settings of what runs there."""

    def __init__(self, cluster: Cluster, shared: Path, base_dir: Path) -> None:
        self.cluster, self.shared, self.base_dir = cluster, shared, base_dir

    def settings(self, name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "storage": str(self.shared / "storage"), "base.model": str(self.base_dir), "base.dtype": "fp32",
                "tracking.uri": self.cluster.tracking} | more

    def words(self, settings: dict[str, Any]) -> list[str]:
        return [f"{key}={json.dumps(value) if isinstance(value, dict | list) else value}" for key, value in settings.items()]

    def disturb(self, host: Host, how: str) -> None:
        """Do it to a worker; a machine that has gone is replaced, one that was away is started anew by its operator (`mend`)."""
        if how == "machine":
            host.kill()
            self.cluster.replace(host)
            return
        (host.cut_link if how == "link" else host.pause)()
        time.sleep(OUT_SECONDS)
        (host.mend_link if how == "link" else host.resume)()

    def mend(self) -> None:
        """Start Ray again where it has ended, as a machine's operator would."""
        for host in self.cluster.workers:
            if not runs(host, "raylet"):
                host.run("ray", "stop", "--force")
                self.cluster.start_worker(host)


def runs(host: Host, words: str) -> list[psutil.Process]:
    """The processes of a host that have `words` in their command line."""
    found = []
    for one in host.processes():
        try:
            if words in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def place(tiny_base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    shared = tmp_path_factory.mktemp("shared")
    with small_disk(shared, 256), ray_cluster([shared, tiny_base_dir], workers=3, cpus=1, spares=6) as cluster:
        yield Place(cluster, shared, tiny_base_dir)


def distill(place: Place, name: str) -> dict[str, Any]:
    path = place.shared / "prompts.jsonl"
    return place.settings(name, **{
        "prompts.source": "jsonl", "prompts.path": str(path if path.exists() else write_prompts(path, 100)), "prompts.count": 100,
        "distill.max_new_tokens": 120, "distill.max_batch_size": 2, "distill.rows_per_file": 8, "distill.held_out": 0.4,
        "distill.workers": {"count": 2, "cpus": 1, "threads": 1}})


def rows_of(place: Place, name: str) -> Rows:
    folder = place.shared / "storage" / "runs" / name / "distill"
    return {part: sorted(read_parts(folder / part, contract).to_pylist(), key=lambda row: row["id"])
            for part, contract in (("responses", RESPONSES), ("features", FEATURES))}


@pytest.fixture(scope="module")
def calm_rows(place: Place) -> Rows:
    place.cluster.result("distill", *place.words(distill(place, "calm")))
    rows = rows_of(place, "calm")
    assert len(rows["responses"]) == 200
    return rows


def test_a_node_that_goes_while_it_distils(place: Place, calm_rows: Rows, moment: random.Random) -> None:
    job = place.cluster.submit("distill", *place.words(distill(place, "disturbed")))
    parts, wanted = place.shared / "storage" / "runs" / "disturbed" / "distill", moment.randrange(1, 12)
    until(lambda: len(list(parts.glob("*/*.parquet"))) >= wanted, SECONDS, 0.02)
    decoding = [host for host in place.cluster.workers if runs(host, "ray::MapWorker")]
    host = moment.choice(decoding or place.cluster.workers)  # on a fast machine the last rows may be on their way to storage
    how = os.environ.get("HYDRA_TEST_FAULT") or moment.choice(FAULTS)
    print(f"{host.name}: {how} after {wanted} parts")
    place.disturb(host, how)
    place.cluster.wait(job)
    assert rows_of(place, "disturbed") == calm_rows
    place.mend()


@pytest.fixture(scope="module")
def calm(place: Place, tiny_base: Base) -> RunConfig:
    """Training that nothing disturbs."""
    config = train(place, tiny_base, "calm-training")
    place.cluster.result("train", *place.words(config_words(place, "calm-training")))
    return config


def config_words(place: Place, name: str, steps: int = STEPS) -> dict[str, Any]:
    return place.settings(name, **{
        "train.drafters": {"hydra": {"kind": "hydra", "draft_vocab_size": 200, "dropout": 0.1}}, "train.rows_per_step": 8,
        "train.max_steps": steps, "train.epochs": 500, "train.validate_every": EVERY, "train.validation_rows": 16,
        "train.workers": {"count": 2, "cpus": 1, "threads": 1}})


def train(place: Place, base: Base, name: str) -> RunConfig:
    config = load_config(None, config_words(place, name))
    write_distilled(config, base)
    return config


def check_training(place: Place, config: RunConfig, calm: RunConfig) -> None:
    """Every step stands once in the curve and in MLflow, and is that of the undisturbed run."""
    curve = curve_of(config, "hydra")
    assert [record["step"] for record in curve] == list(range(STEPS))
    assert without_time(curve) == without_time(curve_of(calm, "hydra"))
    run = json.loads((RunPaths.of(config).stage("train", "hydra") / "manifest.json").read_text())["result"]["run_id"]
    asked = ("import json, sys, mlflow; found = mlflow.MlflowClient(sys.argv[1]).get_metric_history(sys.argv[2], 'train.loss'); "
             "print(json.dumps(sorted(one.step for one in found)))")
    assert json.loads(place.cluster.client.run(sys.executable, "-c", asked, place.cluster.tracking, run)) == list(range(STEPS))


def in_training(place: Place, config: RunConfig, moment: random.Random, until_done: float = SECONDS) -> tuple[str, list[Host]]:
    """A submitted training in its middle: the job, and the machines that train."""
    job = place.cluster.submit("train", *place.words(config_words(place, config.name)))
    least = moment.randrange(EVERY, STEPS - 2 * EVERY)
    until(lambda: saved_steps(config, "hydra") >= least, until_done, 0.05)
    training = [host for host in place.cluster.workers if runs(host, "RayTrainWorker")]
    print(f"in training after step {least}: {[host.name for host in training]}")
    return job, training


def test_a_node_that_goes_while_it_trains(place: Place, calm: RunConfig, tiny_base: Base, moment: random.Random) -> None:
    config = train(place, tiny_base, "disturbed-training")
    job, training = in_training(place, config, moment)
    how = os.environ.get("HYDRA_TEST_FAULT") or moment.choice(FAULTS)
    host = moment.choice(training)
    print(f"{host.name}: {how}")
    place.disturb(host, how)
    place.cluster.wait(job)
    check_training(place, config, calm)
    place.mend()


def test_a_node_that_must_leave(place: Place, tiny_base: Base) -> None:
    """`ray drain-node`, as for a spot machine that is reclaimed: the running step's checkpoint is where training goes on."""
    steps = 1200  # Ray's watcher looks at its nodes every few seconds
    config = train(place, tiny_base, "drained")
    job = place.cluster.submit("train", *place.words(config_words(place, config.name, steps)))
    until(lambda: saved_steps(config, "hydra") >= EVERY, SECONDS, 0.05)
    leaving = next(host for host in place.cluster.workers if runs(host, "RayTrainWorker"))
    leaving.run("ray", "drain-node", f"--address={place.cluster.address}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=reclaimed", "--deadline-remaining-seconds=300")
    saved: set[int] = set()
    told = re.compile(rf"step (\d+)/{steps}, a worker must leave: training goes on from this step's checkpoint")
    until(lambda: saved.add(saved_steps(config, "hydra")) or bool(told.search(place.cluster.log(job))), SECONDS, 0.2)
    saved.add(saved_steps(config, "hydra"))
    log = place.cluster.wait(job)
    assert not runs(leaving, "RayTrainWorker")
    (at,) = map(int, told.findall(log))
    assert EVERY <= at < steps and at in saved, (at, sorted(saved))
    assert [record["step"] for record in curve_of(config, "hydra")] == list(range(steps))
    leaving.run("ray", "stop", "--force")
    place.cluster.start_worker(leaving)


def test_a_tracking_server_that_is_away(place: Place, calm: RunConfig, tiny_base: Base, moment: random.Random) -> None:
    """Training goes on; what it could not log it logs later."""
    config = train(place, tiny_base, "untracked")
    job, _ = in_training(place, config, moment)
    place.cluster.servers.cut_link()
    time.sleep(OUT_SECONDS)
    place.cluster.servers.mend_link()
    place.cluster.wait(job)
    check_training(place, config, calm)


def test_a_storage_that_takes_no_more(place: Place, calm: RunConfig, tiny_base: Base, moment: random.Random) -> None:
    """One line says what to do, and the next run goes on."""
    config = train(place, tiny_base, "refused")
    job, _ = in_training(place, config, moment)
    filler = fill(place.shared)
    until(lambda: place.cluster.status(job) in ENDED, SECONDS, 1.0)
    filler.unlink()
    status, log = place.cluster.status(job), place.cluster.log(job)
    assert status == "FAILED" and "Traceback" not in log, log[-3000:]
    assert [line for line in log.splitlines() if line.startswith("error: ") and str(place.shared) in line], log[-3000:]
    place.cluster.result("train", *place.words(config_words(place, config.name)))
    check_training(place, config, calm)


def test_a_clock_that_is_an_hour_ahead(place: Place, calm: RunConfig, calm_rows: Rows, tiny_base: Base) -> None:
    """One worker lives an hour later than all others."""
    import libfaketime

    ahead = place.cluster.workers[0]
    ahead.run("ray", "stop", "--force")
    library = next(Path(libfaketime.__file__).parent.rglob("libfaketime.so*"))
    before, ahead.environment = ahead.environment, {
        **ahead.environment, "LD_PRELOAD": str(library), "FAKETIME": "+3600s", "DONT_FAKE_MONOTONIC": "1"}
    place.cluster.start_worker(ahead)
    assert abs(float(ahead.run("date", "+%s")) - time.time() - 3600) < 60
    place.cluster.result("distill", *place.words(distill(place, "skewed")))
    assert rows_of(place, "skewed") == calm_rows
    config = train(place, tiny_base, "skewed-training")
    place.cluster.result("train", *place.words(config_words(place, config.name)))
    check_training(place, config, calm)
    ahead.run("ray", "stop", "--force")
    ahead.environment = before
    place.cluster.start_worker(ahead)


def test_two_drivers_of_one_run(place: Place, calm: RunConfig, tiny_base: Base) -> None:
    """One of them says who is at it, and touches nothing."""
    config = train(place, tiny_base, "twice")
    jobs = [place.cluster.submit("train", *place.words(config_words(place, config.name))) for _ in range(2)]
    until(lambda: all(place.cluster.status(job) in ENDED for job in jobs), SECONDS, 1.0)
    (refused,) = [job for job in jobs if place.cluster.status(job) == "FAILED"]
    log = place.cluster.log(refused)
    told = r"error: .*/train/hydra: another run writes to it \(process \d+ on host\d, since .*\): wait for it or stop it"
    assert re.search(told, log) and "Traceback" not in log, log[-2000:]
    check_training(place, config, calm)


def test_a_batch_whose_driver_is_killed(place: Place, tiny_base: Base) -> None:
    """Its application ends and its processors are free within a minute; the next run answers what is left."""
    output = place.shared / "answers"
    rows = place.shared / "rows.jsonl"
    write_prompts(rows, 120)
    words = place.words(place.settings("default", **{
        "batch.input": str(rows), "batch.output": str(output), "batch.max_new_tokens": 120, "batch.rows_per_file": 4,
        "serve.model": "plain", "serve.replicas": 2, "serve.workers": {"cpus": 1, "threads": 1}, "serve.max_batch_size": 2}))
    place.cluster.submit("batch", *words)
    until(lambda: len(list(output.glob("rows/part-*"))) >= 2, SECONDS, 0.05)
    for driver in runs(place.cluster.head, "jobs.batch"):
        driver.kill()
    until(lambda: not any(runs(host, "DecodeServer") for host in place.cluster.workers), 60)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("rows/part-*")}
    found = place.cluster.result("batch", *words)
    assert found["errors"] == 0 and 0 < found["resumed"] < 120
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in output.glob("rows/part-*")}.items()
    check_answers(tiny_base, list(read_batch_rows(output / "rows", "jsonl")), 120, 120, 40)


def test_an_endpoint_whose_parts_die(place: Place, tiny_base: Base, moment: random.Random) -> None:
    """Its controller, a proxy, a replica and a machine, in an order that is drawn, while a batch asks it: every row is answered
    once."""
    rows, output, port = place.shared / "asked.jsonl", place.shared / "asked", 8000
    write_prompts(rows, 300)
    job = place.cluster.submit("serve", *place.words(place.settings("default", **{
        "serve.model": "plain", "serve.host": "0.0.0.0", "serve.port": port, "serve.replicas": 2, "serve.max_batch_size": 2,
        "serve.workers": {"cpus": 1, "threads": 1}})))
    until(lambda: "answers at" in place.cluster.log(job), 300, 2.0)
    batch = place.cluster.client.start("hydra-heads", "batch", "--json", *place.words(place.settings("default", **{
        "batch.address": f"http://{place.cluster.head.address}:{port}/v1", "batch.input": str(rows), "batch.output": str(output),
        "batch.max_new_tokens": 120, "batch.rows_per_file": 4, "batch.concurrency": 8})))
    until(lambda: len(list(output.glob("rows/part-*"))) >= 2, SECONDS, 0.05)
    kills: list[Callable[[], None]] = [lambda: kill_one("ServeController"), lambda: kill_one("ProxyActor"),
                                       lambda: kill_one("DecodeServer"), lambda: lose_a_machine()]

    def everyone() -> list[Host]:
        return [place.cluster.head, *place.cluster.workers]

    def kill_one(words: str) -> None:
        found = [one for host in everyone() for one in runs(host, words)]
        print(f"kill {words}: one of {len(found)}")
        moment.choice(found).kill()

    def lose_a_machine() -> None:
        host = moment.choice([host for host in place.cluster.workers if runs(host, "DecodeServer")])
        print(f"{host.name} dies")
        place.disturb(host, "machine")

    moment.shuffle(kills)
    for kill in kills:
        kill()
        time.sleep(moment.uniform(3, 8))
    said, _ = batch.communicate(timeout=SECONDS)
    assert batch.returncode == 0, said[-3000:]
    assert json_line(said)["errors"] == 0
    check_answers(tiny_base, list(read_batch_rows(output / "rows", "jsonl")), 300, 120, 40)
    place.cluster.client.run("ray", "job", "stop", f"--address={place.cluster.jobs}", job)
    until(lambda: not any(runs(host, "DecodeServer") for host in everyone()), 90)


def test_a_head_that_dies(place: Place, calm: RunConfig, tiny_base: Base, moment: random.Random) -> None:
    """With the driver of the job on it. The same job, submitted to a new head, goes on."""
    config = train(place, tiny_base, "headless")
    in_training(place, config, moment)
    saved = saved_steps(config, "hydra")
    place.cluster.head.kill()
    place.cluster.replace_head()
    place.cluster.result("train", *place.words(config_words(place, config.name)))
    check_training(place, config, calm)
    assert saved >= EVERY
