"""DeepSpeed's settings, the learning rate, and machines that lack a toolchain."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest

from hydra_core.errors import InputError
from pipelines.config import TrainSection, TrainWorkers, load_config
from pipelines.train import deepspeed_config as deepspeed_setup
from pipelines.train.deepspeed_config import check_toolchain, deepspeed_settings, learning_rate, prepare_environment
from tests.packages import pretend


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_settings_follow_the_section(stage: int) -> None:
    train = TrainSection(zero_stage=stage, precision="bf16", rows_per_step=12, grad_clip=0.5,  # type: ignore[arg-type]
                         workers=TrainWorkers(count=3))
    found = deepspeed_settings(train, 3)
    assert found["zero_optimization"]["stage"] == stage and found["bf16"]["enabled"]
    assert found["gradient_clipping"] == 0.5 and found["gradient_accumulation_steps"] == 1
    for world in (1, 3, 5):  # DeepSpeed asks for the product, whatever the rows of a step
        found = deepspeed_settings(train, world)
        assert found["train_batch_size"] == found["train_micro_batch_size_per_gpu"] * world


def test_learning_rate_warms_up_and_falls_to_its_share() -> None:
    train = TrainSection(learning_rate=1.0, warmup_steps=4, final_lr_share=0.1)
    rates = [learning_rate(train, step, 50) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[4:])) and rates[-1] == pytest.approx(0.1)
    assert learning_rate(TrainSection(warmup_steps=0), 0, 1) > 0


def test_wsd_stays_up_and_goes_straight_down_at_the_end() -> None:
    train = TrainSection(learning_rate=1.0, warmup_steps=4, final_lr_share=0.1, schedule="wsd", decay_share=0.2)
    rates = [learning_rate(train, step, 50) for step in range(50)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4:40] == [1.0] * 36
    assert rates[39:] == pytest.approx([1 - 0.09 * step for step in range(11)])
    assert learning_rate(train, 0, 1) > 0


def test_constant_stays_where_the_warmup_ends() -> None:
    train = TrainSection(learning_rate=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(train, step, 50) for step in (3, 4, 49)] == pytest.approx([0.8, 1.0, 1.0])


def test_pieces_of_a_step_are_deepspeeds_own() -> None:
    train = TrainSection(rows_per_step=12, accumulate=3, workers=TrainWorkers(count=2))
    found = deepspeed_settings(train, 2)
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (6, 3)


@pytest.mark.parametrize(("changes", "message"), [
    ({"train.betas": [0.9, 1.0]}, r"train\.betas=\[0\.9, 1\.0\]: each must be at least 0 and below 1"),
    ({"train.ema": 0.9, "train.zero_stage": 3}, r"set train\.zero_stage to 2"),
])
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, changes)


def test_a_missing_compiler_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    check_toolchain(uses_gpu=False)  # the machine that tests has one
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"no C\+\+ compiler \(c\+\+\): install one") as raised:
        check_toolchain(uses_gpu=False)
    assert "\n" not in str(raised.value)
    check_toolchain(uses_gpu=True)  # nothing is compiled there


def test_missing_headers_and_ninja_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed_setup.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(InputError, match=r"Python's headers are missing .*python3\.\d+-dev"):
            check_toolchain(uses_gpu=False)
    pretend(monkeypatch, "ninja", installed=False)
    monkeypatch.setattr(deepspeed_setup.shutil, "which", lambda name: None if name == "ninja" else "/usr/bin/c++")
    with pytest.raises(InputError, match="ninja is missing: pip install ninja"):
        check_toolchain(uses_gpu=False)


def test_environment_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ninja` of an environment that was not activated lies beside the interpreter."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("DS_ACCELERATOR", "")  # so that what the code sets is taken back
    monkeypatch.delenv("DS_ACCELERATOR")
    prepare_environment(uses_gpu=True)
    assert "DS_ACCELERATOR" not in os.environ
    prepare_environment(uses_gpu=False)
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
