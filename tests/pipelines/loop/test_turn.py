"""The settings of a turn, and what passes the standing set; nothing is started."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hydra_core.base import Base
from hydra_core.errors import InputError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from jobs.runner import read_config
from pipelines.config import RunConfig, load_config
from pipelines.loop.stage import CHAMPION, pass_standing
from pipelines.loop.turn import plan_turn
from pipelines.runtime.artifacts import RunPaths
from pipelines.tracking.lookup import Model
from tests.pipelines.synthetic import write_distilled
from tests.trained import random_heads


def config_of(storage: Path, **changes: Any) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": "mine", "loop.partition": "p1", "loop.standing": "/standing.jsonl",
                              **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture
def champion(tiny_base: Base, tmp_path: Path) -> Model:
    """Of another number of heads than the default drafters have."""
    save_checkpoint(tmp_path / "c" / "heads", random_heads(tiny_base, "hydra"), tiny_base.identity,
                    TreeSet({1: DraftTree(((0,),))}), {})
    return Model(tmp_path / "c", "models:/x/3", 3)


def test_training_goes_on_from_the_champion(storage: Path, champion: Model) -> None:
    turn = plan_turn(config_of(storage), champion)
    chain = turn.chain
    assert (chain.name, chain.prompts.source, turn.drafters) == ("mine-p1", "served", ("hydra",))
    assert chain.train.start == {"hydra": str(champion.folder / "heads")}  # type: ignore[operator]
    assert chain.train.drafters["hydra"].num_heads == 3 and chain.train.also == ()
    assert chain.bench.methods == ("ngram", "hydra", "combined") and chain.bench.prompts is None
    assert turn.standing.bench.prompts == "/standing.jsonl" and turn.standing.name == chain.name
    own = plan_turn(config_of(storage, train__drafters={"mine": {"kind": "hydra", "num_heads": 3, "dropout": 0.1}}), champion)
    assert own.drafters == ("mine",) and own.chain.train.drafters["mine"].dropout == 0.1  # the settings of that shape


@pytest.mark.parametrize("champion_of", [None, Model(None, "plain"), "ngram"])
def test_without_heads_to_start_from_all_drafters_are_trained(storage: Path, champion_of: Any, tmp_path: Path) -> None:
    (tmp_path / "ngram").mkdir()
    model = Model(tmp_path / "ngram", "ngram", 1) if champion_of == "ngram" else champion_of
    turn = plan_turn(config_of(storage), model)
    assert turn.drafters == ("medusa", "hydra", "hydra++") and not turn.chain.train.start


def test_old_rows_are_those_of_the_run(storage: Path, tiny_base: Base, tiny_base_dir: Path) -> None:
    config = config_of(storage, base__model=str(tiny_base_dir), base__dtype="fp32")
    write_distilled(config, tiny_base, train=4, held_out=2)
    assert plan_turn(config, None).chain.train.also == ("mine",)
    assert plan_turn(config_of(storage, train__also=["other"]), None).chain.train.also == ("other",)


def test_a_standing_set_is_needed(storage: Path) -> None:
    config = config_of(storage, loop__standing=None)
    with pytest.raises(InputError, match=r"loop\.standing: there are no prompts on which nothing may be lost: name a JSONL file"):
        plan_turn(config, None)
    given = config_of(storage, loop__standing=None, bench__prompts="/b.jsonl")
    assert plan_turn(given, None).standing.bench.prompts == "/b.jsonl"
    assert not RunPaths.of(config).run.exists()


def test_heads_that_cannot_be_read_are_told(storage: Path, champion: Model) -> None:
    assert champion.folder is not None
    (champion.folder / "heads" / "config.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match="the champion's heads cannot be read: promote again"):
        plan_turn(config_of(storage), champion)


def test_days(storage: Path) -> None:
    now = datetime.now(UTC).date()
    today, yesterday = (config_of(storage, loop__partition=word).loop.turn() for word in ("today", "yesterday"))
    assert today in {str(now), str(now + timedelta(1))} and yesterday < today
    assert read_config("loop", None, ["loop.partition=2026-W03"]).loop.turn() == "2026-W03"


def test_what_passes_the_standing_set() -> None:
    def figures(value: float | None) -> dict[str, Any]:
        return {"tokens_per_step": value, "speed_vs_plain": 1.0}

    methods = {"plain": figures(1.0), CHAMPION: figures(2.0), "hydra": figures(1.97), "combined": figures(1.9),
               "ngram": figures(None)}
    kept, lost = pass_standing(methods, 0.02)
    assert kept == ["hydra"] and lost == ["combined gives 1.90 tokens per step, the champion 2.00",
                                          "ngram gives 0.00 tokens per step, the champion 2.00"]
    assert pass_standing({name: value for name, value in methods.items() if name != CHAMPION}, 0.02) == (
        ["hydra", "combined", "ngram"], [])
    with pytest.raises(InputError, match="names no contender besides plain decoding"):
        pass_standing({"plain": figures(1.0)}, 0.02)
