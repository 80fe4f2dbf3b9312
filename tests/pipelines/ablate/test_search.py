"""A search over settings: what is drawn, what is refused, who is stopped, and the whole of it on a tiny base."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.errors import InputError
from jobs.runner import read_config
from pipelines.ablate.results import Tried
from pipelines.ablate.search import best_of
from pipelines.ablate.search_report import markdown, plot_trials
from pipelines.ablate.stage import run_ablate
from pipelines.ablate.trials import Trial, draw_trials, shown, trial_config
from pipelines.ablate.variants import steps_for, summarise
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.dry_run import describe
from pipelines.tracking import Tracker
from pipelines.train.context import LoopSettings
from pipelines.train.halving import Halving, goes_on, halted_step, must_halt, read_journal
from tests.pipelines.synthetic import write_distilled
from tests.processes import killed_when

SPACE = {"train.lr": {"loguniform": [1e-4, 3e-3]}, "train.drafters.hydra.dropout": {"choice": [0, 0.1]},
         "train.rows_per_step": {"randint": [4, 16]}, "train.ema": {"uniform": [0.9, 0.99]}}


def config_for(storage: Path, **ablate: object) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": "s", "train.only": "hydra", "ablate": ablate})


def test_values_are_drawn_from_the_space(storage: Path) -> None:
    config = config_for(storage, space=SPACE, trials=40)
    trials = draw_trials(config, "d")
    assert len(trials) == 40 and trials[0].values == {} and len({trial.label for trial in trials}) == 40
    assert all(set(trial.values) == set(SPACE) for trial in trials[1:])
    rates = [trial.values["train.lr"] for trial in trials[1:]]
    assert min(rates) >= 1e-4 and max(rates) <= 3e-3
    assert 8 <= sum(rate < 5.5e-4 for rate in rates) <= 31  # half of the logarithms; of equally likely rates a sixth
    assert {trial.values["train.drafters.hydra.dropout"] for trial in trials[1:]} == {0, 0.1}
    sizes = {trial.values["train.rows_per_step"] for trial in trials[1:]}
    assert sizes <= set(range(4, 17)) and len(sizes) > 6 and all(isinstance(size, int) for size in sizes)
    assert all(0.9 <= trial.values["train.ema"] <= 0.99 for trial in trials[1:])
    made = trial_config(config, trials[3], trials[3].label, seed=5).train
    assert list(made.drafters) == [trials[3].label] and made.only is None
    assert made.learning_rate == trials[3].values["train.lr"] and made.ema == trials[3].values["train.ema"]
    assert made.drafters[trials[3].label].dropout == trials[3].values["train.drafters.hydra.dropout"]
    assert (made.seed, made.validation_seed) == (5, 0)
    assert trial_config(config, trials[0], "x").train.drafters["x"] == config.train.drafters["hydra"]
    assert shown({"train.lr": 0.00123456, "train.mlp": "gated"}) == "train.lr 0.00123, train.mlp gated"


def test_the_same_search_draws_the_same(storage: Path) -> None:
    trials = draw_trials(config_for(storage, space=SPACE, trials=6), "d")
    assert draw_trials(config_for(storage, space=SPACE, trials=9), "d")[:6] == trials  # more trials are added
    turned = dict(reversed(SPACE.items()))
    assert [one.values for one in draw_trials(config_for(storage, space=turned, trials=6), "d")] == [one.values for one in trials]
    other = draw_trials(config_for(storage, space=SPACE, trials=6, seed=1), "d")
    assert other[1].values != trials[1].values and other[0].label != trials[0].label
    assert draw_trials(config_for(storage, space=SPACE, trials=6), "e")[0].label != trials[0].label  # other rows


@pytest.mark.parametrize(("space", "told"), [
    ({"train.lrr": {"choice": [1]}}, r"ablate\.space: train\.lrr: is no setting: did you mean train\.lr\?"),
    ({"base.dtype": {"choice": ["fp32"]}}, r"base\.dtype: only settings `train\.NAME` and `train\.drafters\.hydra\.NAME`"),
    ({"train.drafters.medusa.dropout": {"choice": [0]}}, r"only settings `train\.NAME`"),
    ({"train.drafters.hydra.droput": {"choice": [0]}}, r"ablate\.space: hydra\.search-\w+\.trial001: .*droput"),
    ({"train.workers": {"choice": [1]}}, r"train\.workers: cannot be searched"),
    ({"train.seed": {"choice": [1, 2]}}, r"train\.seed: cannot be searched"),
    ({"train.lr": {"uniform": [-1.0, -0.5]}}, r"ablate\.space: hydra\.search-\w+\.trial001: .*train\.lr"),
    ({"train.lr": {"loguniform": [0, 1]}}, r"loguniform: 0 has no logarithm"),
    ({"train.lr": {"uniform": [2, 1]}}, r"uniform: \[2, 1\]: the first must be less"),
    ({"train.lr": {"uniform": [1, 2], "choice": [1]}}, r"give one of choice, uniform, loguniform, randint, got choice, uniform"),
    ({"train.lr": {}}, r"give one of choice, uniform, loguniform, randint, got none"),
    ({"train.lr": {"normal": [1, 2]}}, r"ablate\.space\.train\.lr\.normal")])
def test_what_cannot_be_searched(storage: Path, space: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        draw_trials(config_for(storage, space=space), "d")


def test_one_drafter_and_one_kind_of_ablation(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    several = load_config(None, {"storage": str(storage), "ablate": {"space": SPACE}})
    with pytest.raises(InputError, match=r"a search is of one drafter, and train\.drafters has medusa, hydra, hydra\+\+: set"):
        run_ablate(several)
    with pytest.raises(InputError, match=r"ablate\.space and ablate\.variants are two kinds of ablation"):
        config_for(storage, space=SPACE, variants={"a": {"heads": {"kind": "medusa"}}})


def test_who_is_stopped_by_hand(tmp_path: Path) -> None:
    """Rungs at 10, 20 and 40 rows; a trial goes on if it is not below the median of those that came as far before it."""
    def ask(trial: str, step: int, value: float) -> bool:
        return goes_on(Halving(str(tmp_path / "j.jsonl"), trial, 10, 40, 2.0), step, 10 * step, value)

    assert ask("a", 1, 1.5) and ask("a", 2, 1.8)  # the first one has nobody to be compared with
    assert not ask("b", 1, 1.4)
    assert ask("c", 1, 1.6)
    assert not ask("c", 2, 1.7)
    assert ask("d", 1, 1.5)  # equal to the median of 1.5, 1.4 and 1.6
    assert ask("d", 2, 1.75)  # equal to the median of 1.8 and 1.7
    assert [entry["goes_on"] for entry in read_journal(tmp_path / "j.jsonl")] == [True, True, False, True, False, True, True]


def test_a_question_that_was_answered_is_answered_the_same(tmp_path: Path) -> None:
    journal = tmp_path / "j.jsonl"
    first, second = (Halving(str(journal), name, 10, 40, 2.0) for name in ("a", "b"))
    assert goes_on(first, 1, 10, 1.5) and not goes_on(second, 1, 10, 1.4)
    before = journal.read_bytes()
    assert goes_on(first, 1, 10, 0.0) and not goes_on(second, 1, 10, 9.0)  # as recorded
    assert journal.read_bytes() == before
    journal.write_bytes(before + b'{"trial": "c", "st')  # cut off by a kill
    assert not goes_on(Halving(str(journal), "c", 10, 40, 2.0), 1, 10, 1.4)
    assert [entry["trial"] for entry in read_journal(journal)] == ["a", "b", "c"]
    assert goes_on(Halving(str(journal), "early", 10, 40, 2.0), 0, 5, 0.1)  # no rung yet


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_training_ends_at_the_step_where_it_is_stopped(tmp_path: Path, one_rank: None) -> None:
    def context(trial: str, step: int, validated: float | None, total: int = 4) -> Any:
        halving = asdict(Halving(str(tmp_path / "j.jsonl"), trial, 8, 32, 2.0))
        settings = LoopSettings({}, trial, "", "", str(tmp_path / trial), None, None, {}, halving)
        return SimpleNamespace(settings=settings, next_step=step, validated=validated, total=total, first=True,
                               device=torch.device("cpu"), train=SimpleNamespace(rows_per_step=8))

    assert not must_halt(context("a", 1, 1.5)) and halted_step(tmp_path / "a") is None
    assert must_halt(context("b", 1, 1.4)) and halted_step(tmp_path / "b") == 1
    assert must_halt(context("b", 1, 1.4)), "killed before it had ended: the same answer"
    assert not must_halt(context("c", 1, None)), "there was no validation"
    assert not must_halt(context("d", 4, 1.0)), "its last step is its end"
    assert not must_halt(context("e", 0, None))
    no_trial = context("f", 1, 0.5)
    no_trial.settings = replace(no_trial.settings, halving=None)
    assert not must_halt(no_trial)
    assert [(entry["trial"], entry["rows"], entry["goes_on"]) for entry in read_journal(tmp_path / "j.jsonl")] == [
        ("a", 8, True), ("b", 8, False)]


def made_up() -> list[Tried]:
    values = ({}, {"train.lr": 1e-4, "train.mlp": "gated"}, {"train.lr": 3e-3, "train.mlp": "residual"})
    return [Tried(Trial(f"hydra.search-0.trial{number:03d}", found), tokens, 10 * (number + 1), stopped, 60.0)
            for number, (found, tokens, stopped) in enumerate(zip(values, (2.0, 2.3, 2.1), (False, True, False), strict=True))]


def test_the_best_was_trained_to_its_end(tmp_path: Path) -> None:
    tried = made_up()
    best = best_of(tried)
    assert best is tried[2] and best_of(tried[1:2]) is tried[1]
    seeds = summarise([{"tokens_per_step": value, "top1": [0.5], "response_tokens": 10, "steps": 30, "seconds": 60.0}
                       for value in (2.04, 2.06)])
    page = markdown(tried, best, seeds)
    assert "Best: train.lr 0.003, train.mlp residual: 2.100 tokens per step" in page
    assert "the settings as they are: 2.000." in page and "1 of 3 trials were stopped early" in page
    assert "With 2 other seed(s) the best settings make 2.050 ± 0.127" in page
    lines = [line for line in page.splitlines() if line.startswith("| trial")][1:]
    assert [line.split("|")[1].strip() for line in lines] == ["trial002 (best)", "trial000", "trial001"]
    assert "stopped at 20" in lines[2]
    plot_trials(tmp_path / "search.png", tried)
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_tells_of_a_search(storage: Path) -> None:
    (line,) = describe(config_for(storage, space=SPACE, trials=9), "ablate")
    assert line.startswith("ablate: a search over train.lr, train.drafters.hydra.dropout, train.rows_per_step, train.ema: 9 tr")
    assert "3 trainings of the best one" in line


def test_steps_by_hand(storage: Path) -> None:
    train = load_config(None, {"storage": str(storage), "train.epochs": 1.5, "train.rows_per_step": 4}).train
    assert [steps_for(train, rows) for rows in (8, 9, 1)] == [3, 4, 1]
    assert steps_for(train.model_copy(update={"max_steps": 2}), 80) == 2


def words(storage: Path, base: Path) -> list[str]:
    return [f"storage={storage}", "name=s", f"base.model={base}", "base.dtype=fp32", "train.rows_per_step=4", "train.epochs=4",
            "train.validate_every=8", "train.lr=5e-3", "train.validation_rows=16", "train.warmup_steps=1",
            "train.drafters={small: {kind: medusa, num_heads: 2, draft_vocab_size: 100}}",
            "ablate.space={train.lr: {loguniform: [1.0e-8, 1.0e-6]}}", "ablate.trials=4", "ablate.best_seeds=1",
            "ablate.reduction=2"]


@pytest.mark.slow
@pytest.mark.drawn
def test_a_search_that_stops_some_and_is_killed(tiny_base: Base, tiny_base_dir: Path, storage: Path, worker_env: dict[str, str],
                                                local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four trials have rates that teach nothing: they are stopped at the first comparison, the given settings win."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = words(storage, tiny_base_dir)
    config = read_config("ablate", None, given)
    write_distilled(config, tiny_base, train=48, held_out=16)  # 48 steps, validations every 8
    trainings = RunPaths.of(config).stage("train")
    killed_when(lambda: any(trainings.glob("*.trial001/claim.json")), [sys.executable, "-m", "jobs.ablate", *given], worker_env)
    before = {path: path.stat().st_mtime_ns for path in trainings.rglob("manifest.json")}
    assert [path.parent.name[-8:] for path in before] == ["trial000"]

    result = run_ablate(config)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), "what was trained is not trained again"
    assert result.figures["trials"] == 4 and result.figures["stopped"] >= 2
    assert result.figures["best"]["values"] == {} and result.figures["best"]["other_seeds"]["seeds"] == 1
    report = json.loads((RunPaths.of(config).stage("ablate") / "search.json").read_text())
    assert report["trials"][0]["steps"] == 48 and not report["trials"][0]["stopped"]
    stopped = [trial for trial in report["trials"] if trial["stopped"]]
    client = MlflowClient(Tracker.open(config).uri)
    for trial in stopped:
        assert trial["steps"] in (8, 16, 32)
        folder = trainings / trial["label"]
        curve = (folder / "curve.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in curve] == list(range(trial["steps"])), "not one step more"
        assert (folder / "heads" / "model.safetensors").exists()
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["result"]["figures"]["stopped_step"] == trial["steps"]
        run = client.get_run(manifest["result"]["run_id"])
        assert run.data.metrics["stopped_step"] == trial["steps"] and run.info.status == "FINISHED"
        assert float(run.data.params["train.lr"]) == pytest.approx(trial["values"]["train.lr"], rel=1e-3)
        told = [entry for entry in report["comparisons"] if entry["trial"] == trial["label"]]
        assert [entry["goes_on"] for entry in told][-1] is False and told[-1]["step"] == trial["steps"]
    assert {one.path for one in client.list_artifacts(str(result.run_id))} >= {"search.md", "search.json", "search.png"}
    assert run_ablate(config).skipped
