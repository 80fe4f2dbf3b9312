"""Benches of two machines: neither is taken for the other's, and each stays readable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.bench import stage as bench_stage
from pipelines.bench.inputs import bench_fingerprint
from pipelines.bench.results import fitting_bench, result_folder
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig
from pipelines.runtime import measuring
from pipelines.runtime.artifacts import RunPaths, StageResult, claimed_by, read_manifest, stage_folder
from pipelines.runtime.files import write_text
from pipelines.runtime.hardware import Hardware, machine_of, request_of, this_hardware, timed_on
from pipelines.runtime.measuring import HARDWARE, MeasuringPlace, leave_times_of_another_machine, measured_on
from tests.pipelines.bench.test_results import config_for

OTHER = replace(this_hardware(), cpu="Another CPU", cores=64.0)


def on(monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    """From now on this process runs on `machine`."""
    for module in ("pipelines.runtime.measuring", "pipelines.bench.results", "pipelines.profiling.cost_cache"):
        monkeypatch.setattr(f"{module}.this_hardware", lambda: machine)


def finish(config: RunConfig, machine: Hardware | None) -> Path:
    """A finished bench of these settings on `machine`; None: of an earlier version."""
    asked = bench_fingerprint(config, {})
    wanted = asked if machine is None else timed_on(asked, machine.digest)
    folder = result_folder(RunPaths.of(config).stage("bench"), wanted, "questions")
    with stage_folder(config, "bench", folder, wanted) as stage:
        write_text(folder / "report.json", "{}")
        files = [folder / "report.json"] + ([] if machine is None else [MeasuringPlace(machine).record(folder)])
        stage.finish(StageResult("bench", None, {"report": str(folder / "report.json")}, {}), files)
    return folder


def test_another_machine_s_bench_is_not_done(tiny_base_dir: Path, storage: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(storage, tiny_base_dir)
    first = finish(config, OTHER)
    asked: list[str] = []

    def measure(config: RunConfig, wanted: str, *rest: Any) -> StageResult:
        bench_stage.tell_of_other_machines(config, wanted, rest[-1])
        asked.append(wanted)
        return StageResult("bench", None, {"report": str(finish(config, this_hardware()) / "report.json")}, {})

    monkeypatch.setattr(bench_stage, "_measure", measure)
    second = Path(run_bench(config).outputs["report"]).parent
    assert [machine_of(one) for one in asked] == [this_hardware().digest] and second != first
    assert f"{first} was measured on another machine ({OTHER.label}): every contender is measured again on this one (" in (
        capsys.readouterr().err)
    assert run_bench(config).skipped and len(asked) == 1
    assert second.name.endswith(f"-{this_hardware().digest[:8]}") and measured_on(second) == this_hardware().label
    assert fitting_bench(config)[0] == second  # what is promoted here was measured here
    on(monkeypatch, OTHER)
    assert run_bench(config).outputs["report"] == str(first / "report.json") and fitting_bench(config)[0] == first
    on(monkeypatch, replace(OTHER, cores=3.0))
    assert fitting_bench(config)[0] in (first, second)  # as on a driver that measures nothing itself
    assert "not recorded" not in capsys.readouterr().err


def test_an_earlier_version_s_bench_stays_readable(tiny_base_dir: Path, storage: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(storage, tiny_base_dir)
    folder = finish(config, None)
    assert run_bench(config).skipped and fitting_bench(config)[0] == folder
    assert capsys.readouterr().err.count(f"{folder} was measured on a machine that is not recorded") == 2


def test_trees_of_another_machine_make_room(storage: Path, tiny_base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A drafter has one folder of trees, which later stages read."""
    config, folder = config_for(storage, tiny_base_dir), storage / "tree" / "hydra"
    here = MeasuringPlace(this_hardware())
    wanted = timed_on("a" * 64, here.hardware.digest)

    def fill(owner: str) -> None:
        with stage_folder(config, "tree", folder, owner) as stage:
            write_text(folder / "costs.json", "{}")
            stage.finish(StageResult("tree", None, {}, {}), [folder / "costs.json", MeasuringPlace(OTHER).record(folder)])

    fill(timed_on("a" * 64, OTHER.digest))
    leave_times_of_another_machine("tree hydra", folder, wanted, here)
    assert not folder.exists()
    assert f"was measured on another machine ({OTHER.label}): it is measured again on this one (" in capsys.readouterr().err
    for owner, earlier in ((wanted, ()), (timed_on("b" * 64, OTHER.digest), ()), ("c" * 64, ())):
        fill(owner)
        leave_times_of_another_machine("tree hydra", folder, wanted, here)
        assert claimed_by(folder) == owner and read_manifest(folder)  # other work: `stage_folder` says so
        leave_times_of_another_machine("tree hydra", folder, timed_on("d" * 64, OTHER.digest), here, {owner, *earlier})
        assert not folder.exists()
    assert claimed_by(folder) is None and request_of(wanted) == "a" * 64 and HARDWARE == "hardware.json"


def test_the_place_is_this_machine_unless_a_cluster_is_joined(storage: Path, tiny_base_dir: Path) -> None:
    with measuring.measuring_place(config_for(storage, tiny_base_dir)) as place:
        assert place == MeasuringPlace(this_hardware())


def test_on_a_cluster_it_is_the_worker_s(storage: Path, tiny_base_dir: Path, local_ray: None,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that measure run on the node that was asked."""
    import ray

    monkeypatch.setattr(measuring, "cluster_address", lambda config: "10.0.0.1:6379")
    with measuring.measuring_place(config_for(storage, tiny_base_dir)) as place:
        assert place.hardware.digest == this_hardware().digest
        strategy = place.options["scheduling_strategy"]
        assert strategy.node_id == ray.get_runtime_context().get_node_id() and not strategy.soft
        task = ray.remote(lambda: ray.get_runtime_context().get_node_id())
        assert ray.get(task.options(num_cpus=0.1, **place.options).remote()) == strategy.node_id
