"""What stops a run, and averaged weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hydra_core.errors import StoppedError
from jobs import runner
from pipelines.config import load_config
from pipelines.train.divergence import raise_if_stopped, why_not_keep, why_stop, write_stop
from pipelines.train.ema import WeightAverage


@pytest.mark.parametrize(("record", "why"), [
    ({"loss": math.nan}, "the loss is not a number"),
    ({"loss": 1.0, "gradient": math.inf}, "the gradients are not numbers"),
    ({"loss": 9.0, "gradient": 1.0}, "the loss is 9, over 4 times the first step's 2"),
    ({"loss": 8.0}, None),
])
def test_what_stops_a_run(record: dict[str, float], why: str | None) -> None:
    assert why_stop([{"loss": 2.0}, {"loss": 1.0}], record, 4.0) == why
    assert why_stop([], {"loss": 1e30}, 4.0) is None  # nothing to compare the first step with


def test_a_loss_that_explodes_after_it_has_fallen() -> None:
    """It need not come back to where it began; one bad batch is no explosion."""
    fallen = [{"loss": 9.0}] * 5 + [{"loss": 2.0}] * 40
    assert why_stop(fallen, {"loss": 20.0}, 4.0) is None
    assert why_stop([*fallen, {"loss": 20.0}], {"loss": 2.1}, 4.0) is None
    assert why_stop([*fallen, {"loss": 20.0}, {"loss": 12.0}], {"loss": 30.0}, 4.0) == (
        "the loss is 12 or more in 3 steps, over 4 times the 2 before")
    assert why_stop([{"loss": 2.0}] * 10, {"loss": 7.9}, 4.0) is None


def test_heads_without_a_held_out_loss_are_not_kept() -> None:
    assert why_not_keep({"head0_loss": 1.0, "tokens_per_step": math.nan}) is None
    assert why_not_keep({"head0_loss": 1.0, "head1_loss": math.inf}) == "the held-out loss is not a number"


def test_the_driver_tells_what_step_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capfd: pytest.CaptureFixture[str]) -> None:
    raise_if_stopped(tmp_path, "hydra", None)
    write_stop(tmp_path, "the loss is not a number", {"step": 41, "lr": 0.001})
    heads = tmp_path / "checkpoint" / "heads"
    heads.mkdir(parents=True)
    (heads / "provenance.json").write_text(json.dumps({"training": {"step": 40}}))

    def stop(config: object) -> None:
        raise_if_stopped(tmp_path, "hydra", SimpleNamespace(path=str(tmp_path / "checkpoint")))

    monkeypatch.setattr(runner, "_pipeline", lambda stage: stop)
    assert runner.run("train", []) == 1
    said = capfd.readouterr().err.strip()
    assert said == (f"error: train.drafters.hydra: the loss is not a number at step 41 (lr 1.00e-03): the last good checkpoint, "
                    f"after 40 steps, is {heads}; lower train.lr or raise train.warmup_steps, under another name")
    with pytest.raises(StoppedError, match="no checkpoint was made before"):
        raise_if_stopped(tmp_path, "hydra", None)


def test_averaged_weights_are_the_formula_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    average = WeightAverage(model, 0.5)
    wanted = model.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        wanted = kept * wanted + (1 - kept) * model.weight.detach()
    own = model.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(model.weight.detach(), wanted)
        inside = model.weight.detach().clone()
    assert torch.equal(model.weight, own) and not torch.equal(inside, own)
    average.save(tmp_path)
    again = WeightAverage(model, 0.5)
    again.load(tmp_path)
    with again.applied():
        assert torch.equal(model.weight, inside)


def test_an_average_is_made_when_asked_for() -> None:
    model = nn.Linear(1, 1)
    assert WeightAverage.asked_for(model, load_config().train) is None
    assert WeightAverage.asked_for(model, load_config(None, {"train.ema": 0.9}).train) is not None
