"""Points, words and costs of a learning curve, from made-up trainings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hydra_core.errors import InputError
from pipelines.config import RunConfig, load_config
from pipelines.curve.cost import Cost, cost_of, duration
from pipelines.curve.points import Point, Trained, drafters_of, plan_points, point_config, stepping_seconds
from pipelines.curve.power_law import CannotFit
from pipelines.curve.report import answers, markdown, plot_curves, terminal_table
from pipelines.curve.results import BackTest, curve_of, curves_of
from pipelines.rows.schemas import content_id, is_in_share
from pipelines.runtime.artifacts import RunPaths, StageResult, fingerprint, stage_folder

IDS = tuple(content_id(number) for number in range(2000))


def config_for(storage: Path, **changes: object) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": "c", "train.rows_per_step": 8, "train.epochs": 2.0, **changes})


def trainings(values: dict[int, list[float]], drafter: str = "hydra") -> list[Trained]:
    most = max(values)
    return [Trained(Point(drafter, rows / most, seed, rows, 10), value, 100 * rows, rows / 10)
            for rows, found in values.items() for seed, value in enumerate(found)]


def rising(rows: int) -> float:
    return 2.6 - 3.0 * rows ** -0.3


def test_points_are_nested_shares_of_the_same_training(storage: Path) -> None:
    config = config_for(storage, **{"curve.drafters": ["hydra", "medusa"], "curve.seeds": [3], "curve.shares": [1.0, 0.125, 0.5],
                                    "curve.least_steps": 50, "train.share": 0.5, "train.seed": 9})
    points = plan_points(config, IDS)
    assert [(point.drafter, point.share) for point in points] == [
        (drafter, share) for share in (0.125, 0.5, 1.0) for drafter in ("hydra", "medusa")]
    kept = {share: [one for one in IDS if is_in_share(one, share * 0.5)] for share in (0.125, 0.5, 1.0)}
    assert set(kept[0.125]) < set(kept[0.5]) < set(kept[1.0])
    assert [point.rows for point in points[::2]] == [len(ids) for ids in kept.values()]
    smallest, middle, whole = points[::2]
    assert smallest.steps == 50 > 2 * smallest.rows / 8  # two epochs would be fewer
    assert middle.steps == -(-2 * middle.rows // 8) and whole.steps == -(-2 * whole.rows // 8)
    train = point_config(config, smallest).train
    assert list(train.drafters) == ["hydra.share0.125.seed3"] and train.share == 0.125 * 0.5
    assert (train.seed, train.validation_seed, train.max_steps) == (3, 9, 50)
    assert train.epochs * smallest.rows >= 50 * 8  # so that the epochs do not end it earlier
    equal = plan_points(config_for(storage, **{"curve.steps_per_share": "equal", "curve.drafters": ["hydra"]}), IDS)
    assert {point.steps for point in equal} == {2 * 2000 // 8}
    limited = plan_points(config_for(storage, **{"train.max_steps": 7}), IDS)
    assert {point.steps for point in limited} == {7}, "curve.least_steps is no more than train.max_steps"


def test_which_drafters(storage: Path) -> None:
    assert drafters_of(config_for(storage)) == ("medusa", "hydra", "hydra++")
    assert drafters_of(config_for(storage, **{"train.only": "hydra"})) == ("hydra",)
    with pytest.raises(InputError, match=r"curve\.drafters: 'x' is none of train\.drafters: medusa, hydra"):
        drafters_of(config_for(storage, **{"curve.drafters": ["hydra", "x"]}))


@pytest.mark.parametrize(("changes", "told"), [
    ({"curve.shares": [0.001, 1.0]}, r"curve\.shares: the share 0\.001 of 2,000 training rows is \d rows?, fewer than the 8 of"),
    ({"curve.shares": [0.5, 0.50001]}, r"curve\.shares: the share 0\.50001 .* holds the same rows as a smaller one"),
    ({"curve.shares": [0.5, 1.5]}, r"curve\.shares\.1: Input should be less than or equal to 1"),
    ({"curve.shares": [0.0]}, r"curve\.shares\.0: Input should be greater than 0"),
    ({"curve.shares": [0.5, 0.5]}, r"curve\.shares=\[0\.5, 0\.5\]: names one twice"),
    ({"curve.shares": []}, r"curve\.shares"), ({"curve.ahead": [1.0]}, r"curve\.ahead\.0"),
    ({"curve.seeds": [1, 1]}, r"curve\.seeds=\[1, 1\]: names one twice")])
def test_shares_that_make_no_curve(storage: Path, changes: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        plan_points(config_for(storage, **changes), IDS)


def test_the_answer_and_its_back_test() -> None:
    trained = trainings({rows: [rising(rows) - 0.002, rising(rows) + 0.002] for rows in (100, 200, 400, 800, 1600)})
    curve = curve_of(trained, 5.0, [4.0])
    assert isinstance(curve.backtest, BackTest) and curve.backtest.held
    assert curve.backtest.foretold.rows == 1600 and curve.backtest.measured == pytest.approx(rising(1600))
    lines = answers("hydra", curve)
    assert lines[0].startswith("hydra: 4 x the rows (6,400) would bring 2.38 (2.") and "the 1,600 rows bring 2.272" in lines[0]
    assert "1,600 rows; 2.272 were measured, inside the interval" in lines[1]
    figures = json.loads(json.dumps(curve.figures()))
    assert figures["backtest"]["held"] is True and figures["law"]["rises"] is True
    assert [point["rows"] for point in figures["points"]] == [100, 200, 400, 800, 1600]


def test_a_back_test_that_fails_is_told() -> None:
    """The last point falls off the curve, as where its training went wrong."""
    found = {rows: [rising(rows) - 0.002, rising(rows) + 0.002] for rows in (100, 200, 400, 800)} | {1600: [1.7, 1.7]}
    curve = curve_of(trainings(found), 5.0, [2.0])
    assert isinstance(curve.backtest, BackTest) and not curve.backtest.held
    assert "OUTSIDE the interval" in answers("hydra", curve)[-1]


def test_too_few_points_are_told() -> None:
    few = curve_of(trainings({100: [1.5], 200: [1.6]}), 5.0, [4.0])
    assert isinstance(few.law, CannotFit) and not few.ahead
    assert answers("hydra", few) == ["hydra: no curve: a curve of three parameters needs 4 or more different numbers of rows, "
                                     "and there are 2."]
    four = curve_of(trainings({rows: [rising(rows)] for rows in (100, 200, 400, 800)}), 5.0, [4.0])
    assert "no back-test: without the largest share a curve of three parameters needs 4" in answers("hydra", four)[-1]
    flat = curve_of(trainings({rows: [2.0, 2.02] for rows in (100, 200, 400, 800, 1600)}), 5.0, [4.0])
    assert "more rows are not shown to help" in answers("hydra", flat)[0]


def test_the_page_and_the_figure(tmp_path: Path) -> None:
    trained = [one for drafter in ("hydra", "medusa") for one in trainings(
        {rows: [rising(rows), rising(rows) + 0.01] for rows in (100, 200, 400, 800, 1600)}, drafter)]
    curves = curves_of(trained, {"hydra": 5.0, "medusa": 5.0}, [2.0, 4.0])
    cost = Cost(30_000, 27_000, 3600.0, 7200.0, "this machine (2 CPUs of X)")
    page = markdown(curves, cost)
    assert cost.sentence == ("30,000 more prompts cost 3.0 h on this machine (2 CPUs of X): 60 min to distill them and 2.0 h to "
                             "train a drafter on them (27,000 rows)")
    assert cost.sentence + "." in page and "## medusa" in page
    assert "| 1 | 1,600 | 160,000 | 10 | 2.277 (2.272 - 2.282) | 2 |" in page
    plot_curves(tmp_path / "curve.png", curves)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(terminal_table(curves).rows) == 10


def test_seconds_of_a_training_by_hand() -> None:
    assert stepping_seconds([10.0, 11.0, 12.0, 13.0]) == pytest.approx(4.0)  # three gaps, and the first step like them
    assert stepping_seconds([10.0, 11.0, 12.0, 5012.0]) == pytest.approx(2 + 50 + 1)  # stopped, and continued after an hour
    assert stepping_seconds([10.0]) == 0.0
    assert [duration(value) for value in (12.4, 720.0, 11_160.0)] == ["12 s", "12 min", "3.1 h"]


def write_distill(config: RunConfig, figures: dict[str, int], seconds: float) -> None:
    folder = RunPaths.of(config).stage("distill")
    with stage_folder(config, "distill", folder, fingerprint("distill", {}, {})) as stage:
        (folder / "x").write_text("x")
        stage.finish(StageResult("distill", None, {}, figures), [folder / "x"])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"seconds": seconds}))


def test_what_more_prompts_cost_by_hand(storage: Path) -> None:
    """100 answers were made in 50 s, 40 stood before; the largest share trains 1,600 rows in 160 s."""
    config = config_for(storage, **{"curve.more_prompts": 1000, "distill.temperatures": [0.0, 1.0], "distill.held_out": 0.1})
    write_distill(config, {"responses": 140, "resumed": 40}, 50.0)
    cost = cost_of(config, trainings({100: [2.0], 1600: [2.1, 2.2]}))
    assert (cost.rows, cost.distill, cost.train) == (1800, pytest.approx(1000.0), pytest.approx(180.0))
    assert cost.sentence.startswith("1,000 more prompts cost 20 min on this machine (") and "17 min to distill" in cost.sentence


def test_a_distill_that_does_not_tell_its_time(storage: Path) -> None:
    config = config_for(storage)
    write_distill(config, {"responses": 40, "resumed": 40}, 1.0)
    cost = cost_of(config, trainings({1600: [2.1]}))
    assert cost.distill is None and "how long `distill` took for its rows is not recorded" in cost.sentence
