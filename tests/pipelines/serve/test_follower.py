"""What a look at a real registry leads to: other heads, the same, none; the application itself is a stand-in."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import DraftTree, TreeSet
from pipelines.config import RunConfig, load_config
from pipelines.serve import follower as module
from pipelines.serve.follower import Follower
from pipelines.serve.following import Follow
from pipelines.serve.messages import AppArgs
from pipelines.serve.stage import build_app
from pipelines.tracking import Tracker, register
from tests.broken_heads import break_heads
from tests.trained import random_heads

NAME = "followed"


class App:
    """The application: what it decodes with, and what happens when it is given other heads."""

    def __init__(self) -> None:
        self.heads: dict[str, Any] = {"configuration": None, "version": None}
        self.given: list[int | None] = []
        self.refuses: Exception | None = None

    def state(self, name: str) -> dict[str, Any]:
        return {"replicas": [{"heads": self.heads}]}

    def update(self, args: AppArgs) -> SimpleNamespace:
        if self.refuses is not None:
            raise self.refuses
        assert args.digest is not None  # it was checked
        self.heads = {"configuration": args.configuration, "version": args.version}
        self.given.append(args.version)
        return SimpleNamespace()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> App:
    app = App()
    monkeypatch.setattr(module, "ask_front", app.state)
    monkeypatch.setattr(module, "update_app", app.update)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return app


@pytest.fixture
def config(storage: Path, tiny_base_dir: Path) -> RunConfig:
    return load_config(None, {"storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32",
                              "promote.model_name": NAME, "serve.model": f"models:/{NAME}@champion"})


def follower_of(config: RunConfig) -> Follower:
    follow = Follow.of(config)
    assert follow is not None
    return Follower(AppArgs(config.base.model_dump(), f"{config.storage}/cache", None, "plain", follow=asdict(follow)))


def promoted(config: RunConfig, folder: Path) -> int:
    with Tracker.open(config).start("promote") as run:
        run.log_artifact(folder, "configuration")
        return register(config, NAME, run, "configuration", "champion", {})


def test_what_the_alias_names_decodes(app: App, config: RunConfig, tiny_base: Base, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "good", random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: DraftTree(((0,),))}), {})
    save_configuration(tmp_path / "a", DecodingConfiguration("hydra", "heads", tiny_base.identity, heads=tmp_path / "good"))
    follower, client = follower_of(config), MlflowClient(Tracker.open(config).uri)
    assert (follower.look()["outcome"], app.given) == ("unnamed", [])  # nobody has promoted anything
    assert promoted(config, tmp_path / "a") == 1
    assert follower.look() == {"outcome": "changed", "version": 1, "why": ""} and app.given == [1]
    assert follower.look()["outcome"] == "same" and follower_of(config).look()["outcome"] == "same" and app.given == [1]

    for number, damage in enumerate(("another base", "truncated", "misshapen key"), start=2):
        folder = tmp_path / damage
        break_heads(tmp_path / "good", folder / "heads", damage)
        (folder / "configuration.json").write_bytes((tmp_path / "a" / "configuration.json").read_bytes())
        assert promoted(config, folder) == number
        found = follower.look()
        assert (found["outcome"], found["version"]) == ("rejected", number) and found["why"] and "\n" not in found["why"]
        assert follower.look()["outcome"] == "same"  # it is not tried again
    assert app.given == [1]

    client.set_registered_model_alias(NAME, "champion", "1")
    assert follower.look()["outcome"] == "same" and app.given == [1]
    app.heads = {"configuration": "/by/hand", "version": None}
    assert follower.look()["outcome"] == "changed" and app.given == [1, 1]  # the alias counts
    client.delete_registered_model_alias(NAME, "champion")
    found = follower.look()
    assert found["outcome"] == "unnamed" and f"models:/{NAME}@champion: is not registered" in found["why"]


def test_what_replicas_reject_is_not_given_to_them_again(app: App, config: RunConfig, tiny_base: Base, tmp_path: Path) -> None:
    save_configuration(tmp_path / "a", DecodingConfiguration("ngram", "ngram", tiny_base.identity))
    promoted(config, tmp_path / "a")
    follower = follower_of(config)
    app.refuses = StoppedError("serve.update: no replica of it runs at this moment")
    assert [follower.look()["outcome"] for _ in range(2)] == ["later", "later"]
    app.refuses = InputError("serve.update: it was rejected, the other one stays: missing")
    assert [follower.look()["outcome"] for _ in range(2)] == ["rejected", "same"]
    promoted(config, tmp_path / "a")
    app.refuses = None
    assert follower.look()["outcome"] == "changed" and app.given == [2]


def test_a_registry_that_is_gone_is_no_error(app: App, config: RunConfig) -> None:
    gone = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    found = follower_of(gone).look()
    assert found["outcome"] == "silent" and "no MLflow server answers there" in found["why"] and not app.given


@pytest.mark.parametrize(("args", "why"), [
    ({"follow": {"every": 3}}, r"args\.follow: got an unexpected keyword argument 'every'"),
    ({"record": {"share": 1.0}}, r"args\.record: missing \d required positional arguments"),
    ({"webhook_secret_file": "/nobody"}, "cannot be read as text")])
def test_arguments_of_a_serve_config_are_checked(args: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        build_app({"base": {}, "cache": "", "configuration": None, "label": "plain", **args})
