"""Runs side by side: found by id or exact name, what differs at every stage that led to them, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError
from jobs.runner import run
from pipelines.compare.figures import methods_of
from pipelines.compare.lineage import StageRun
from pipelines.compare.settings import setting_rows
from pipelines.compare.stage import run_compare
from pipelines.tracking import Tracker, register
from tests.pipelines.compare.recorded import config_for, log_bench, record_chain
from tests.pipelines.synthetic import write_distilled


@pytest.fixture(autouse=True)
def _own_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def bench(storage: Path, name: str, gain: float = 1.3, **settings: object) -> str:
    """A chain with a bench alone; returns its run id."""
    with Tracker.open(config_for(storage, name=name, **settings)).start("bench") as found:
        log_bench(found, storage / f"{name}.bench", {"plain": 1.0, "hydra++": gain}, 0, questions=8)
        return found.run_id


def test_two_chains_and_every_stage_in_which_they_differ(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = record_chain(storage, "one", 1.3, train__lr=1e-3, prompts__count=400)
    second = record_chain(storage, "two", 1.7, seed=1, train__lr=5e-4, prompts__count=2000, base__dtype="fp32")
    result = run_compare(config_for(storage, compare__runs=["one", second["bench"]]))
    assert [found["run_id"] for found in result.figures["runs"]] == [first["bench"], second["bench"]]
    dtypes = {"base.dtype": ["bf16", "fp32"]}
    assert result.figures["differences"] == {"bench": dtypes, "train": dtypes | {"train.lr": ["0.001", "0.0005"]},
                                             "distill": dtypes | {"prompts.count": ["400", "2000"]}}
    slower, faster = ([run["methods"]["hydra++"]["speed_vs_plain"] for run in result.figures["runs"]])
    assert 1.2 < slower < 1.4 < 1.55 < faster < 1.8
    told = capsys.readouterr().err
    assert "train.lr" in told and "distill, train, bench" in told and "hydra_pp" not in told
    assert ": faster." in result.figures["headline"] and result.figures["notes"] == []

    data = json.loads(Path(result.outputs["data"]).read_text(encoding="utf-8"))
    assert [curve["tokens"][-1] for curve in data["curves"]] == [40000, 40000]
    assert data["curves"][0]["device_seconds"][-1] == 80.0  # two workers, a second each step
    assert data["curves"][1]["held_out"][-1] == [40000, 80.0, 1.36]
    costs = {(cost["run"], cost["stage"]): cost for cost in data["costs"]}
    assert (costs["one", "distill"]["cpu_seconds"], costs["one", "distill"]["tokens"]) == (80.5, 12345)
    assert costs["two", "train hydra++"]["kwh"] is None and ("two", "bench") in costs
    text = Path(result.outputs["markdown"]).read_text(encoding="utf-8")
    assert "| train.lr | train | 0.001 | 0.0005 |" in text and "## Acceptance by depth" in text

    client = MlflowClient(Tracker.open(config_for(storage)).uri)
    for ids in (first, second):
        (folder,) = client.list_artifacts(ids["chain"], "comparisons")
        assert {Path(one.path).name for one in client.list_artifacts(ids["chain"], folder.path)} == {"compare.html", "compare.md"}
        assert client.get_run(ids["chain"]).info.status == "FINISHED"
    assert result.figures["linked_from"] == [first["chain"], second["chain"]]


def test_by_the_chains_own_id_and_from_the_command_line(storage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench(storage, "one")
    second = bench(storage, "two")
    parent = Tracker.open(config_for(storage, name="one")).parent()
    output = storage / "page"
    assert run("compare", [parent, f"storage={storage}", second, f"compare.output={output}"]) == 0
    assert '"stage": "compare"' in capfd.readouterr().out and (output / "compare.html").stat().st_size > 10**6
    (storage / "other").mkdir()
    (storage / "other" / "file").write_text("mine", encoding="utf-8")
    for words, fault in (([parent], "name two runs or more"), ([parent, "none"], "'none' is no run's name"),
                         ([parent, "one"], "are the same run"), ([second, second], "are the same run"),
                         ([parent, "0" * 32], "is no run's name and no run id"),
                         ([parent, second, f"compare.output={storage}/other"], "is not empty and holds no comparison"),
                         ([parent, second, f"compare.output={storage}/other/file"], "is a file"),
                         ([parent, second, "compare.stage=tree"], f"{parent!r} is no finished `tree`")):
        assert run("compare", [*words, f"storage={storage}"]) == 2
        told = capfd.readouterr().err
        assert fault in told and told.count("\n") == 1, told


def test_names_are_matched_exactly(storage: Path) -> None:
    """`_` is a character of names, and LIKE's sign for any character."""
    other, mine, last = bench(storage, "a-b"), bench(storage, "a_b"), bench(storage, "axb")
    result = run_compare(config_for(storage, compare__runs=["a_b", "axb"]))
    assert [found["run_id"] for found in result.figures["runs"]] == [mine, last]
    with pytest.raises(InputError, match="'a_' is no run's name"):
        run_compare(config_for(storage, compare__runs=["a_", other]))
    with pytest.raises(InputError, match="\"a' or '1\" is no run's name"):
        run_compare(config_for(storage, compare__runs=["a' or '1", other]))


def test_what_was_deleted_is_named(storage: Path) -> None:
    one, two, three = bench(storage, "one"), bench(storage, "two"), bench(storage, "three", tracking__experiment="other")
    client = MlflowClient(Tracker.open(config_for(storage)).uri)
    client.delete_run(two)
    client.delete_run(Tracker.open(config_for(storage, name="two")).parent())
    experiment = client.get_experiment_by_name("other")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    for asked, told in ((two, f"the run {two} was deleted: `mlflow runs restore --run-id {two}`"), (three, "was deleted"),
                        ("two", "the runs of 'two' were deleted"), ("three", "the runs of 'three' were deleted")):
        with pytest.raises(InputError, match=r"^compare\.runs: ") as caught:
            run_compare(config_for(storage, compare__runs=[one, asked]))
        assert told in str(caught.value)


def test_what_is_not_finished_or_lacks_the_stage(storage: Path) -> None:
    done = bench(storage, "one")
    with pytest.raises(RuntimeError), Tracker.open(config_for(storage, name="two")).start("bench") as failed:
        raise RuntimeError
    Tracker.open(config_for(storage, name="three")).start("bench")
    with Tracker.open(config_for(storage, name="four")).start("distill") as distilled:
        pass
    Tracker.open(config_for(storage, name="five")).parent()
    client = MlflowClient(Tracker.open(config_for(storage)).uri)
    stranger = client.create_run(client.create_experiment("mine")).info.run_id
    for asked, told in (("two", "'two' has no finished `bench`: it has failed: run `hydra-heads bench name=two`"),
                        (failed.run_id, "has no finished `bench`: it has failed"), ("three", "it is not finished"),
                        ("four", "they have no finished stage in common: 'one' has bench; 'four' has distill"),
                        (distilled.run_id, "is no finished `distill`, nor a run that has one: it has bench"),
                        ("five", "'five' has no run of a stage"), (stranger, "was not made by this project")):
        with pytest.raises(InputError, match=r"^compare\.runs: ") as caught:
            run_compare(config_for(storage, compare__runs=["one", asked]))
        assert told in str(caught.value)
    with pytest.raises(InputError, match="'one' is no finished `distill`"):
        run_compare(config_for(storage, compare__runs=["one", "four"], compare__stage="distill"))
    with pytest.raises(InputError, match=r"is a run of `bench` and .* of `distill`: name runs of one stage"):
        run_compare(config_for(storage, compare__runs=[done, distilled.run_id]))


def test_of_several_benches_the_one_with_the_settings_given(storage: Path) -> None:
    limited = bench(storage, "one", 1.1, bench__limit=3)
    latest, other = bench(storage, "one", 1.3, bench__limit=9), bench(storage, "two", 1.6)
    for settings, wanted in (({"bench__limit": 3}, limited), ({}, latest), ({"bench__limit": 5}, latest)):
        found = run_compare(config_for(storage, compare__runs=["one", other], **settings))
        assert [run["run_id"] for run in found.figures["runs"]] == [wanted, other]
    both = run_compare(config_for(storage, compare__runs=[limited, latest]))  # of one chain
    assert [run["name"] for run in both.figures["runs"]] == [f"one ({limited[:8]})", f"one ({latest[:8]})"]
    assert both.figures["differences"] == {"bench": {"bench.limit": ["3", "9"]}}


def test_machines_are_named_and_never_mixed(storage: Path) -> None:
    record_chain(storage, "one", 1.3)
    record_chain(storage, "far", 1.7, machine="8 cores of Another CPU")
    record_chain(storage, "old", 1.7, machine=None)
    result = run_compare(config_for(storage, compare__runs=["one", "far", "old"]))
    notes = " ".join(result.figures["notes"])
    assert "The machine of old was not recorded" in notes
    assert "one on 2 cores of Some CPU (AMX); far on 8 cores of Another CPU" in notes
    assert "No paired test of far against one: they were measured on machines that differ" in notes
    assert "No paired test of old against one: the machine of one of them was not recorded" in notes
    assert json.loads(Path(result.outputs["data"]).read_text(encoding="utf-8"))["pairs"] == []
    assert "times that of" not in result.figures["headline"]


def test_the_code_that_each_run_had(storage: Path) -> None:
    for name, changed in (("one", "yes"), ("two", "no")):
        run_id = bench(storage, name)
        client = MlflowClient(Tracker.open(config_for(storage)).uri)
        for tag, value in {"mlflow.source.git.commit": "0123456789abcdef", "hydra_heads.changed": changed}.items():
            client.set_tag(run_id, tag, value)
    result = run_compare(config_for(storage, compare__runs=["one", "two"]))
    data = json.loads(Path(result.outputs["data"]).read_text(encoding="utf-8"))
    assert [run["commit"] for run in data["runs"]] == ["0123456789+", "0123456789"]


def test_benches_of_other_work_are_not_paired(storage: Path) -> None:
    record_chain(storage, "one", 1.3, bench__max_new_tokens=64)
    record_chain(storage, "two", 1.7, bench__max_new_tokens=128)
    result = run_compare(config_for(storage, compare__runs=["one", "two"]))
    assert result.figures["notes"] == ["No paired test of two against one: they differ in bench.max_new_tokens."]


def test_trainings_of_two_drafters(storage: Path) -> None:
    """By their own run ids: settings of the drafters stand side by side whatever the drafters are called."""
    heads = "train__drafters"
    one = record_chain(storage, "one", drafter="small", **{heads: {"small": {"kind": "hydra", "num_heads": 2}}})
    two = record_chain(storage, "one", drafter="large", **{heads: {"large": {"kind": "hydra", "num_heads": 4}}})
    result = run_compare(config_for(storage, compare__runs=[one["train"], two["train"]]))
    assert result.figures["compared"] == "train"
    assert result.figures["differences"]["train"] == {"train.drafters.DRAFTER.num_heads": ["2", "4"]}
    assert [run["name"] for run in result.figures["runs"]] == ["one small", "one large"]
    assert result.figures["runs"][0]["figures"]["tokens per step, held-out rows"] == pytest.approx(1.04)
    assert result.figures["headline"] == "tokens per step, held-out rows: one small 1.04; one large 1.04."


def test_settings_of_another_chains_heads_and_rows(storage: Path, tiny_base: Base) -> None:
    """A run names the folders that it read: what wrote them led to it, in whichever chain, even without a run in MLflow."""
    for name, steps in (("near", 9), ("far", 8)):
        config = config_for(storage, name=name, distill__max_new_tokens=steps)
        features = write_distilled(config, tiny_base, train=2, held_out=1)
        with Tracker.open(config_for(storage, name=f"{name}-heads")).start("train", part="hydra", fingerprint=name) as train:
            train.log_dataset("features", name, str(features), "training")
    result = run_compare(config_for(storage, compare__runs=["near-heads", "far-heads"]))
    assert result.figures["differences"] == {"distill": {"distill.max_new_tokens": ["9", "8"]}}


def test_loads_batches_and_ablations(storage: Path) -> None:
    rate = {"share": 1, "tokens_per_second": 90.5, "goodput": 80.0, "first_token_p50_ms": 50.0, "first_token_p99_ms": 99.0,
            "between_pieces_p99_ms": 5.0, "refused": 0, "failed": 0, "lost": 0}
    reports = {"load": {"label": "plain", "capacity": {"requests_per_second": 2.0, "tokens_per_second": 91.0}, "rates": [rate]},
               "batch": {"rows": 500, "tokens_per_second": 250.5, "acceptance": None, "model": "plain"},
               "ablate": {"variants": {"all rows": {"tokens_per_step": 1.69, "spread": 0.02}}}}
    for name in ("one", "two"):
        for stage, report in reports.items():
            with Tracker.open(config_for(storage, name=name)).start(stage) as made:
                made.log_text(json.dumps(report), "report.json")
    wanted = {"load": ("1 x capacity: goodput, tokens/s", 80.0), "batch": ("tokens per second", 250.5),
              "ablate": ("all rows: tokens per step", "1.690 ± 0.020")}
    for stage, (figure, value) in wanted.items():
        result = run_compare(config_for(storage, compare__runs=["one", "two"], compare__stage=stage))
        assert [run["figures"][figure] for run in result.figures["runs"]] == [value, value]
    assert run_compare(config_for(storage, compare__runs=["one", "two"])).figures["compared"] == "load"


@pytest.mark.parametrize("by", ["load", "batch"])
def test_what_led_to_a_model_that_was_served(storage: Path, tmp_path: Path, by: str) -> None:
    """A load names the version that answered, and the version the run that registered it, in another chain."""
    for number, rate in enumerate((1e-3, 5e-4), 1):
        record_chain(storage, f"chain{number}", train__lr=rate)
        config = config_for(storage, name=f"chain{number}", train__lr=rate)
        (tmp_path / "heads").mkdir(exist_ok=True)
        (tmp_path / "heads" / "file").write_text(str(rate), encoding="utf-8")
        with Tracker.open(config).start("promote") as promoted:
            promoted.log_artifact(tmp_path / "heads", "configuration")
            register(config, "heads", promoted, "configuration", "champion", {})
        label = f"models:/heads/{number}" if number == 1 else f"models:/heads@champion (version {number})"
        with Tracker.open(config_for(storage, name=f"load{number}")).start(
                by, params={"serves": label} if by == "load" else {}) as load:
            load.log_text(json.dumps({"label": label, "model": label, "rows": 1}), "report.json")
    result = run_compare(config_for(storage, compare__runs=["load1", "load2"]))
    assert result.figures["differences"] == {"train": {"train.lr": ["0.001", "0.0005"]}}


def test_names_of_an_earlier_version(storage: Path) -> None:
    """A run without its configuration as an artifact has it as params; renamed settings and heads are the same thing under their
    present names."""
    def stage(**params: str) -> list[StageRun]:
        return [StageRun("bench", None, None, params)]

    assert setting_rows([stage(**{"bench.heads": "bundled"}), stage(**{"bench.heads": "shipped"})]) == ()
    then = methods_of({}, {"shipped.tokens_per_step": 2.0, "shipped.speed_vs_plain": 1.4, "hydra_pp.speed_vs_plain": 1.2})
    assert list(then) == ["bundled", "hydra++"] and then["bundled"].tokens_per_step == 2.0
    config = config_for(storage, name="old", bench__max_batch_size=4)
    tracker = Tracker.open(config)
    client = MlflowClient(tracker.uri)
    for number, batch in enumerate(("4", "5")):
        made = client.create_run(tracker.experiment_id, run_name="bench", tags={
            "hydra_heads.stage": "bench", "hydra_heads.part": "-", "hydra_heads.chain": f"old{number}@{storage}"}).info.run_id
        for name, value in {"bench.running_batch": batch, "train.learning_rate": "0.001"}.items():
            client.log_param(made, name, value)
        client.log_metric(made, "hydra_pp.speed_vs_plain", 1.2)
        client.set_terminated(made)
    result = run_compare(config_for(storage, compare__runs=["old0", "old1"]))
    assert result.figures["differences"] == {"bench": {"bench.max_batch_size": ["4", "5"]}}
    assert result.figures["runs"][0]["methods"]["hydra++"]["speed_vs_plain"] == 1.2


def test_a_chain_that_takes_no_artifact_costs_no_page(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = bench(storage, "one"), bench(storage, "two")
    parent = Tracker.open(config_for(storage, name="one")).parent()
    MlflowClient(Tracker.open(config_for(storage)).uri).delete_run(parent)
    result = run_compare(config_for(storage, compare__runs=[one, two]))
    assert result.figures["linked_from"] == [Tracker.open(config_for(storage, name="two")).parent()]
    assert Path(result.outputs["page"]).is_file() and f"run {parent} has no link to the page" in capsys.readouterr().err
