"""What may be asked to decode: champions, folders, plain decoding, and heads that come with the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from hydra_core.base import Base, load_base
from hydra_core.bundled import folders as bundled
from hydra_core.decoding import DecodingConfiguration, load_heads, read_configuration, save_configuration
from hydra_core.decoding.configuration import ANY_FORMAT
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.proposers import AdaptiveDrafter
from hydra_core.tree import DraftTree, TreeSet
from jobs.runner import run
from pipelines.bench.stage import find_heads, run_bench
from pipelines.config import RunConfig, load_config
from pipelines.profiling.weight_format import resolve_format
from pipelines.promote.stage import run_promote
from pipelines.runtime.artifacts import RunPaths
from pipelines.tracking.champion import reigning
from pipelines.tracking.lookup import find_model
from tests.trained import random_heads


@pytest.fixture
def package(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled heads that knows the tiny base; returns its configuration folder."""
    heads, folder = tmp_path / "heads", tmp_path / "bundled" / "tiny"
    save_checkpoint(heads, random_heads(tiny_base, "hydra++"), tiny_base.identity, TreeSet({1: DraftTree(((0,), (0, 0)))}), {})
    save_configuration(folder, DecodingConfiguration("tiny", "combined", replace(tiny_base.identity, weight_format=ANY_FORMAT),
                                                     heads=heads))
    monkeypatch.setattr(bundled, "FOLDER", folder.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    values = {"storage": str(storage), "base.model": str(base), "base.dtype": "fp32"}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def test_without_a_champion_the_packages_heads_decode(package: Path, tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir)
    assert find_model(config, None).folder == find_model(config, "bundled").folder == package
    assert find_model(config, "shipped").folder == package  # the earlier word
    assert "package" in find_model(config, None).label
    assert find_model(config, "plain").folder is None
    assert find_model(config, str(storage)).folder == storage
    with pytest.raises(InputError, match="is not registered"):
        find_model(config, "models:/hydra-heads@champion")


@pytest.mark.parametrize("asked", [None, "models:/heads@champion", "models:/heads/3"])
def test_a_registry_that_fails_is_no_empty_registry(package: Path, tiny_base_dir: Path, storage: Path, asked: str | None,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundled heads do not take the place of a champion that nobody could look up, and nothing is promoted over it."""
    def fail(*_: object) -> None:
        raise MlflowException("the server is overloaded", error_code=TEMPORARILY_UNAVAILABLE)

    client = SimpleNamespace(get_model_version_by_alias=fail, get_model_version=fail)
    monkeypatch.setattr("pipelines.tracking.registry.open_client", lambda *_: client)
    config = config_for(storage, tiny_base_dir)
    with pytest.raises(StoppedError, match=r"^generate\.model=models:/\S+: the registry does not say .*the server is overloaded"):
        find_model(config, asked, "generate.model")
    with pytest.raises(StoppedError, match="the server is overloaded"):
        reigning(config)


def test_the_setting_is_named(package: Path, tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir)
    for asked in ("models:/heads@champion", "models:/heads/3", "models:/heads"):
        with pytest.raises(InputError, match=rf"^generate\.model={asked}: "):
            find_model(config, asked, "generate.model")


def test_a_base_without_bundled_heads(package: Path, tiny_base_dir: Path, storage: Path) -> None:
    path = package / "configuration.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["base"]["digest"], "0" * 64))
    config = config_for(storage, tiny_base_dir)
    with pytest.raises(InputError, match="is not registered: run `hydra-heads promote`"):
        find_model(config, None)
    with pytest.raises(InputError, match=r"no heads come with the package for base\.model="):
        find_model(config, "bundled")
    assert find_heads(config) == {}


def test_bundled_heads_go_with_every_weight_format(package: Path, tiny_base: Base, tiny_base_dir: Path, storage: Path) -> None:
    drafter, trees = load_heads("bundled", tiny_base)
    assert isinstance(drafter, AdaptiveDrafter) and drafter.heads is not None and trees is None
    half = load_base(str(tiny_base_dir), dtype="bf16", cache=storage)
    assert isinstance(load_heads(package, half)[0], AdaptiveDrafter)
    # no format is fixed by it: `auto` is left to choose
    assert resolve_format(config_for(storage, tiny_base_dir, base__dtype="auto"), "serve").base.dtype == "fp32"


@pytest.mark.slow
def test_bundled_heads_are_measured_and_promoted(package: Path, tiny_base_dir: Path, storage: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.promote.gates.Judgement.holds", lambda *_: True)  # of a tiny base all speeds are noise
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a b a b a b", "hello")), encoding="utf-8")
    config = config_for(storage, tiny_base_dir, bench__prompts=str(prompts), bench__max_new_tokens=8, bench__identity_prompts=2,
                        promote__min_gain=0.0, bench__methods=["bundled"])
    figures = run_bench(config).figures["methods"]
    assert set(figures) == {"plain", "bundled"} and figures["bundled"]["fp32"]["different"] == 0
    promoted = run_promote(config)
    assert promoted.figures["champion"] == "bundled"
    configuration = read_configuration(RunPaths.of(config).stage("promote") / "configuration")
    assert configuration.drafter == "combined" and configuration.base.weight_format == "fp32"
    assert find_model(config, None).version == 1  # a champion comes before what is bundled


def test_generate(package: Path, tiny_base: Base, tiny_base_dir: Path, storage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32", "max_new_tokens=12"]
    assert run("generate", ["say a = b", "hello", *words]) == 0
    out, err = capfd.readouterr()
    fast = json.loads(out)
    assert len(fast["answers"]) == 2 and "package" in fast["model"] and fast["run_id"] is None
    assert all(answer["text"] in err and 0 < answer["new_tokens"] <= 12 for answer in fast["answers"])
    assert run("generate", ["say a = b", "hello", *words, "model=plain"]) == 0
    plain = json.loads(capfd.readouterr().out)
    assert [answer["text"] for answer in plain["answers"]] == [answer["text"] for answer in fast["answers"]]
    assert all(answer["tokens_per_step"] == 1 for answer in plain["answers"] if answer["steps"])
    for bad, told in ((["  ", *words], "generate.prompts"), (["hello", *words, "model=/nowhere"], "/nowhere"),
                      (["hello", *words[:-1], "max_new_tokens=0"], "max_new_tokens"), (["hello " * 900, *words], "context")):
        assert run("generate", bad) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.splitlines()[-1].startswith("error: ") and told in err, err
