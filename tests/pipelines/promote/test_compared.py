"""Bench and promote on a tiny base, with a champion that takes part: nothing is made up but who was champion before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, save_configuration
from hydra_core.errors import InputError, StoppedError
from hydra_core.heads.checkpoint import save_checkpoint
from hydra_core.tree import PLAIN, DraftTree, TreeSet
from pipelines.bench.champion import find_champion, same_contender
from pipelines.bench.inputs import find_heads, find_methods, with_champion
from pipelines.bench.questions import load_questions
from pipelines.bench.stage import run_bench
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import run_promote
from pipelines.tracking import Tracker
from pipelines.tracking.champion import champion_number, promote_version
from tests.trained import overfit_heads, random_heads

QUESTIONS = ["What is a draft tree?", "Count to ten.", "Name a colour.", "Say it again."]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def config(tiny_base: Base, tiny_base_dir: Path, storage: Path) -> RunConfig:
    """Four questions, and heads whose tree is: do not draft."""
    storage.mkdir()
    (storage / "questions.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS), encoding="utf-8")
    save_checkpoint(storage / "heads", random_heads(tiny_base, "hydra"), tiny_base.identity, TreeSet({1: PLAIN}), {})
    return load_config(None, {"storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32",
                              "bench.prompts": str(storage / "questions.jsonl"), "bench.heads": str(storage / "heads"),
                              "bench.methods": ["transformers", "hydra"], "bench.max_new_tokens": 24, "bench.identity_prompts": 2,
                              "bench.threads": 1})


def changed(config: RunConfig, **bench: object) -> RunConfig:
    return config.model_copy(update={"bench": config.bench.model_copy(update=bench)})


def register(config: RunConfig, configuration: DecodingConfiguration, folder: Path) -> int:
    """Somebody promotes `configuration`."""
    save_configuration(folder, configuration)
    with Tracker.open(config).start("promote", part=folder.name) as run:
        run.log_artifact(folder, "configuration")
        return promote_version(config, run, "configuration", {"drafter": configuration.name}, champion_number(config))


def test_which_contender_the_champion_is(config: RunConfig, tiny_base: Base, storage: Path,
                                         capfd: pytest.CaptureFixture[str]) -> None:
    heads = find_heads(config)
    methods = find_methods(config, heads)
    assert find_champion(config, heads, methods) is None
    with pytest.raises(InputError, match=r"bench\.champion=True: models:/hydra-heads@champion names no version"):
        find_champion(changed(config, champion=True), heads, methods)
    plain = DecodingConfiguration("plain", "plain", tiny_base.identity)
    register(config, plain, storage / "plain")
    assert with_champion(config, heads, methods)[0] == ("plain", "transformers", "hydra")
    same = DecodingConfiguration("theirs", "heads", tiny_base.identity, heads=storage / "heads")
    register(config, same, storage / "same")
    found = find_champion(config, heads, methods)
    assert found is not None and (found.version, found.method) == (2, "hydra")
    asked, found = with_champion(config, heads, ("plain", "transformers"))
    assert found is not None and found.method == "@champion" == asked[-1]
    for off in (changed(config, champion=False), changed(config, single=False)):
        assert with_champion(off, heads, methods) == (methods, None)
    assert with_champion(changed(config, champion=True), heads, methods)[0] == methods  # not timed twice
    ngram = DecodingConfiguration("ngram", "ngram", tiny_base.identity)
    assert same_contender(ngram, heads, ("plain", "ngram"), ngram.ngram) == "ngram"
    assert same_contender(ngram, heads, ("plain",), ngram.ngram) is None
    dynamic = DecodingConfiguration("combined", "combined", tiny_base.identity, heads=storage / "heads")
    assert same_contender(dynamic, heads, ("plain", "hydra", "combined"), dynamic.ngram) == "combined"
    assert same_contender(dynamic, heads, ("plain", "hydra"), dynamic.ngram) is None

    other = config.model_copy(update={"base": config.base.model_copy(update={"dtype": "bf16"})})
    assert find_champion(other, heads, methods) is None
    assert "the champion is not timed: bench.champion: models:/hydra-heads/2 is of another base" in capfd.readouterr().err
    away = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    assert find_champion(away, heads, methods) is None
    assert "the champion is not timed: tracking.uri=http://127.0.0.1:9: no MLflow server answers" in capfd.readouterr().err
    for strict, kind in ((other, InputError), (away, StoppedError)):
        with pytest.raises(kind):
            find_champion(changed(strict, champion=True), heads, methods)


@pytest.mark.slow
@pytest.mark.drawn
def test_the_champion_takes_part_and_heads_that_do_not_draft_never_win(
        local_ray: None, config: RunConfig, tiny_base: Base, storage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = run_bench(config)
    assert first.figures["methods"]["hydra"]["tokens_per_step"] == 1.0 and first.figures["comparison"]["champion"] is None
    promoted = run_promote(config)
    assert (promoted.figures["champion"], promoted.figures["version"]) == ("plain", 1)
    assert "hydra (drafts nothing that is accepted)" in promoted.figures["why"]
    client = MlflowClient(Tracker.open(config).uri)
    model = client.get_logged_model(client.get_model_version("hydra-heads", "1").source.removeprefix("models:/"))
    inputs = client.get_run(str(first.run_id)).inputs.dataset_inputs
    (questions,) = [one for one in inputs if one.dataset.name == "questions"]
    assert {(one.key, one.value, one.dataset_name, one.dataset_digest) for one in model.metrics} == {
        (name, 1.0, questions.dataset.name, questions.dataset.digest) for name in ("tokens_per_step", "speed_vs_plain")}
    assert run_bench(config).skipped and run_promote(config).skipped  # the champion is its own plain decoding

    theirs = overfit_heads(tiny_base, "hydra", [question.prompt_ids for question in load_questions(config)[0]])
    save_checkpoint(storage / "theirs", theirs, tiny_base.identity, TreeSet({1: DraftTree(((0,), (0, 0), (0, 0, 0)))}), {})
    register(config, DecodingConfiguration("theirs", "heads", tiny_base.identity, heads=storage / "theirs"), storage / "two")
    assert not run_promote(config).figures["promoted"] and champion_number(config) == 2  # it was measured before
    second = run_bench(config)
    assert not second.skipped and second.outputs["report"] != first.outputs["report"]
    methods = second.figures["methods"]
    assert set(methods) == {"plain", "transformers", "hydra", "@champion"}
    assert methods["@champion"]["tokens_per_step"] > 1.2 and methods["@champion"]["fp32"]["different"] == 0
    assert methods["hydra"]["vs_champion"]["questions"] == 4 and methods["@champion"]["vs_champion"]["speed"] == 1.0
    assert "| vs champion |" in Path(second.outputs["report"]).with_suffix(".md").read_text(encoding="utf-8")
    inputs = MlflowClient(Tracker.open(config).uri).get_run(str(second.run_id)).inputs.dataset_inputs
    assert {one.dataset.name: one.dataset.source for one in inputs}["@champion"] == "models:/hydra-heads/2"

    decided = run_promote(config)
    stays = decided.figures.get("promoted") is False
    assert decided.figures["champion"] == ("theirs" if stays else "plain")  # on so small a base drafting may not pay at all
    assert champion_number(config) == (2 if stays else 3) and run_bench(config).skipped and run_promote(config).skipped
    assert stays or "gives way: it is slower than plain decoding in this bench" in decided.figures["why"]
    record = json.loads(Path(decided.outputs["decision"]).with_suffix(".json").read_text(encoding="utf-8"))
    gates = {one["contender"]: {gate["name"]: gate for gate in one["gates"]} for one in record["contenders"]}
    assert gates["hydra"]["acceptance"]["verdict"] == "failed" and gates["@champion"]["lossless"]["verdict"] == "passed"
    assert gates["@champion"]["margin over champion"]["reason"] == "is the champion" and gates["plain"] == {}
    back = run_promote(config.model_copy(update={"promote": config.promote.model_copy(update={"rollback": True})}))
    assert back.figures["version"] == champion_number(config) == (1 if stays else 2)
