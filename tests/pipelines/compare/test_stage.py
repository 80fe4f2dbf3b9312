"""Benches side by side: found by id or name, their differences and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_core.errors import InputError
from jobs.runner import run
from pipelines.compare.stage import _methods, recipe_differences, run_compare
from pipelines.config import RunConfig, load_config
from pipelines.tracking import RunRecord, Tracker


def record(storage: Path, name: str, speed: float, **settings: object) -> str:
    """A bench as MLflow keeps it."""
    config = config_for(storage, name=name, **settings)
    with Tracker.open(config).start("bench") as bench:
        bench.log_metrics({"plain.tokens_per_step": 1.0, "plain.speed_vs_plain": 1.0, "hydra++.tokens_per_step": 2 * speed,
                           "hydra++.speed_vs_plain": speed, "hydra++.spread_low": speed - 0.1,
                           "hydra++.spread_high": speed + 0.1, "hydra++.rows": 9})
        return bench.run_id


def config_for(storage: Path, **settings: object) -> RunConfig:
    return load_config(None, {"storage": str(storage), **{key.replace("__", "."): value for key, value in settings.items()}})


def test_side_by_side(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(storage, "one", 1.1, train__lr=1e-3)
    first = record(storage, "one", 1.3, train__lr=1e-3)  # the latest counts
    second = record(storage, "two", 1.6, train__lr=5e-4, base__dtype="fp32")
    result = run_compare(config_for(storage, compare__runs=["one", second]))
    assert [found["run_id"] for found in result.figures["runs"]] == [first, second]
    assert result.figures["differences"] == {"base.dtype": ["bf16", "fp32"], "train.learning_rate": ["0.001", "0.0005"]}
    hydra = [found["methods"]["hydra_pp"] for found in result.figures["runs"]]
    assert [values["speed_vs_plain"] for values in hydra] == [1.3, 1.6] and "rows" not in hydra[0]
    told = capsys.readouterr().err
    assert "2.60  1.30x  (1.20 - 1.40)" in told and "3.20  1.60x  (1.50 - 1.70)" in told and "lr" not in told.split("base")[0]


def test_by_the_chains_own_id_and_from_the_command_line(storage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record(storage, "one", 1.3)
    second = record(storage, "two", 1.6)
    parent = Tracker.open(config_for(storage, name="one")).parent()
    assert run("compare", [parent, f"storage={storage}", second]) == 0
    assert '"stage": "compare"' in capfd.readouterr().out
    for words, fault in (([parent], "name two runs or more"), ([parent, "none"], "'none' is no finished bench")):
        assert run("compare", [*words, f"storage={storage}"]) == 2
        assert fault in capfd.readouterr().err


def test_an_unfinished_bench_is_none(storage: Path) -> None:
    record(storage, "one", 1.3)
    with pytest.raises(RuntimeError), Tracker.open(config_for(storage, name="two")).start("bench"):
        raise RuntimeError
    with pytest.raises(InputError, match="'two' is no finished bench"):
        run_compare(config_for(storage, compare__runs=["one", "two"]))


def test_of_several_benches_the_one_with_the_settings_given(storage: Path) -> None:
    limited = record(storage, "one", 1.1, bench__limit=3)
    latest, other = record(storage, "one", 1.3, bench__limit=9), record(storage, "two", 1.6)
    for settings, wanted in (({"bench__limit": 3}, limited), ({}, latest), ({"bench__limit": 5}, latest)):
        found = run_compare(config_for(storage, compare__runs=["one", other], **settings))
        assert [run["run_id"] for run in found.figures["runs"]] == [wanted, other]


def test_names_of_an_earlier_version(storage: Path) -> None:
    """Renamed settings and heads are the same thing under their present names."""
    now = RunRecord("1", "one", {"bench.max_batch_size": "4", "bench.concurrency": "[1]", "bench.heads": "bundled"},
                    {"bundled.tokens_per_step": 2.0, "bundled.speed_vs_plain": 1.5})
    then = RunRecord("2", "two", {"bench.running_batch": "4", "bench.load": "[1]", "bench.heads": "shipped"},
                     {"shipped.tokens_per_step": 2.0, "shipped.speed_vs_plain": 1.4})
    assert recipe_differences([now, then]) == {}
    assert [list(_methods(bench)) for bench in (now, then)] == [["bundled"], ["bundled"]]
