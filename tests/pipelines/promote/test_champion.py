"""Who is champion in a real MLflow on SQLite: what is recorded, how it goes back, and two promotions at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from hydra_core.decoding import read_configuration
from hydra_core.errors import InputError
from jobs.runner import run
from pipelines.config import RunConfig, load_config
from pipelines.promote.stage import run_promote
from pipelines.tracking import Tracker, resolve
from pipelines.tracking import champion as registry
from pipelines.tracking.champion import (
    AliasMoved,
    Version,
    champion_number,
    champions_before,
    promote_version,
    reigning,
    roll_back,
    versions_of,
)
from tests.conftest import ROOT
from tests.pipelines.promote.test_stage import benched, config_for


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def config(storage: Path) -> RunConfig:
    return load_config(None, {"storage": str(storage), "name": "chain"})


@pytest.fixture
def promoted(config: RunConfig, tmp_path: Path) -> Callable[..., int]:
    """Registers a version with a folder of its own and gives it the alias in place of the present champion."""
    def promote(expected: int | None = -1, **changes: Any) -> int:
        own = config.model_copy(update={"promote": config.promote.model_copy(update=changes)})
        folder = tmp_path / "configuration"
        folder.mkdir(exist_ok=True)
        (folder / "configuration.json").write_text(json.dumps({
            "schema_version": 1, "name": "ngram", "drafter": "ngram", "ngram": {"max_match": 3, "min_match": 2, "length": 8},
            "base": {"name": "tiny", "digest": "0" * 64, "weight_format": "fp32"}}), encoding="utf-8")
        with Tracker.open(own).start("promote") as made:
            made.log_artifact(folder, "configuration")
            return promote_version(own, made, "configuration", {"drafter": "ngram", "decision": "x" * 3000},
                                   champion_number(own) if expected == -1 else expected)
    return promote


def tags_of(config: RunConfig, number: int) -> dict[str, str]:
    return dict(MlflowClient(Tracker.open(config).uri).get_model_version("hydra-heads", str(number)).tags)


def test_what_is_recorded_and_how_it_goes_back(config: RunConfig, promoted: Callable[..., int], tmp_path: Path) -> None:
    assert champion_number(config) is None and reigning(config) is None and versions_of(config) == []
    assert [promoted(), promoted(reason="more rows"), promoted()] == [1, 2, 3]
    reign = reigning(config)
    assert reign is not None and (reign.model, reign.version.number) == ("models:/hydra-heads/3", 3)
    assert reign.version.since >= reign.version.created and read_configuration(reign.folder).name == "ngram"
    second = tags_of(config, 2)
    assert second["previous_champion"] == "1" and second["promoted_reason"] == "more rows" and second["promoted_by"]
    assert tags_of(config, 1)["previous_champion"] == "none" and len(second["decision"]) == 1000

    roll_back(config, 3, 2)
    assert champion_number(config) == 2
    left, back = tags_of(config, 3), tags_of(config, 2)
    assert left["rolled_back_to"] == "2" and back["restored_from"] == "3" and back["restored_reason"] == "none given"
    again = reigning(config)
    assert again is not None and again.version.since > reign.version.since  # what was measured before counts as older
    with pytest.raises(AliasMoved, match=r"names version 2 since another promotion"):
        roll_back(config, 3, 1)


def test_rollback_by_command(config: RunConfig, promoted: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={config.storage}", "name=chain", "--rollback"]
    assert run("promote", words) == 2
    assert capfd.readouterr().err.endswith("error: promote.rollback: models:/hydra-heads@champion names no version: promote one "
                                            "first\n")
    for _ in range(3):
        promoted()
    assert run("promote", [*words, "--dry-run"]) == 0 and champion_number(config) == 3
    assert json.loads(capfd.readouterr().out)["dry_run"] is True
    assert run("promote", [*words, "promote.reason=answers got slow"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["version"], said["rolled_back"], champion_number(config)) == (2, 3, 2)
    assert tags_of(config, 3)["rolled_back_reason"] == tags_of(config, 2)["restored_reason"] == "answers got slow"
    assert run("promote", words) == 0 and champion_number(config) == 1  # further back
    assert run("promote", words) == 2 and champion_number(config) == 1
    assert "version 1 has no champion before it that could be restored: there is nothing to go back to" in capfd.readouterr().err
    assert promoted() == 4 and tags_of(config, 4)["previous_champion"] == "1"
    assert run("promote", words) == 0 and champion_number(config) == 1  # not to 3, which was left


def test_rollback_passes_over_what_is_gone(config: RunConfig, promoted: Callable[..., int],
                                           capfd: pytest.CaptureFixture[str]) -> None:
    """A version that was deleted, and one whose files are gone."""
    for _ in range(4):
        promoted()
    client = MlflowClient(Tracker.open(config).uri)
    client.delete_model_version("hydra-heads", "3")
    _, folder = resolve(config, "models:/hydra-heads/2", Path(config.storage) / "download")
    (folder / "configuration.json").unlink()
    folder.rmdir()
    assert run("promote", [f"storage={config.storage}", "--rollback"]) == 0 and champion_number(config) == 1
    assert "version 2 is passed over: " in capfd.readouterr().err


def test_champions_in_order() -> None:
    """By the tag; where that ends, by number: not those that lost, were rolled back or belong to another alias."""
    def versions(**tags: dict[str, str]) -> list[Version]:
        return [Version(int(name[1:]), 0.0, found) for name, found in tags.items()]

    was = {"alias": "champion", "promoted_at": "2026-01-01T00:00:00+00:00"}
    linked = versions(v1=was | {"previous_champion": "none"}, v2=was | {"previous_champion": "1"},
                      v3=was | {"previous_champion": "1", "rolled_back_at": "x"}, v4=was | {"previous_champion": "2"})
    assert champions_before(linked, 4, "champion") == [2, 1] and champions_before(linked, 1, "champion") == []
    early = versions(v1={}, v2={"drafter": "ngram"}, v3={"alias": "champion", "not_promoted": "x"}, v4={"alias": "canary"} | was,
                     v5={})
    early[3].tags["alias"] = "canary"  # type: ignore[index]
    assert champions_before(early, 5, "champion") == [2, 1]
    torn = [version for version in linked if version.number != 2]
    assert champions_before(torn, 4, "champion") == [1]


@pytest.mark.parametrize("first", [False, True])
def test_another_promotion_in_between(config: RunConfig, promoted: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
                                      first: bool) -> None:
    """Before the version is registered, or between that and the alias: the later one changes nothing, and says so."""
    promoted()
    if first:
        promoted()
        with pytest.raises(AliasMoved, match="names version 2"):
            promoted(expected=1)
        assert [version.number for version in versions_of(config)] == [1, 2] and champion_number(config) == 2
        return
    client, real = MlflowClient(Tracker.open(config).uri), registry.versions_of

    def moved(own: RunConfig) -> list[Version]:  # by hand, in MLflow's pages
        made = client.create_model_version("hydra-heads", source=Path(config.storage).as_uri())
        client.set_registered_model_alias("hydra-heads", "champion", made.version)
        return real(own)

    monkeypatch.setattr(registry, "versions_of", moved)
    with pytest.raises(AliasMoved, match="names version 3"):
        promoted(expected=1)
    assert champion_number(config) == 3 and "names version 3" in tags_of(config, 2)["not_promoted"]


def test_of_two_that_have_registered_the_first_wins(config: RunConfig, promoted: Callable[..., int],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has set the alias yet: the numbers decide. One that gave up is not waited for long."""
    promoted()
    client = MlflowClient(Tracker.open(config).uri)
    source = Path(config.storage).as_uri()
    pending = {"alias": "champion", "previous_champion": "1"}
    client.create_model_version("hydra-heads", source=source, tags=pending)
    with pytest.raises(AliasMoved, match="names version 2"):
        promoted(expected=1)
    assert champion_number(config) == 1
    monkeypatch.setattr(registry, "PENDING", 0.0)
    assert promoted(expected=1) == 4 == champion_number(config)


PROMOTE = """
import json, sys
from pipelines.config import load_config
from pipelines.promote.stage import run_promote

config = load_config(None, json.loads(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps(run_promote(config).figures))
"""


@pytest.mark.slow
def test_two_processes_promote_at_once(tiny_base_dir: Path, storage: Path, store: str) -> None:
    """Each has a bench that was measured when there was no champion. One becomes champion, the other says that it is not, since
    its bench is older than that."""
    ours = {"tracking__uri": store, "promote__model_name": "at-once"}
    values = {"storage": str(storage), "base.model": str(tiny_base_dir), "base.dtype": "fp32"} | {
        name.replace("__", "."): value for name, value in ours.items()}
    children = []
    for name, speeds in (("one", {"ngram": 1.5}), ("two", {"ngram": 0.5})):
        benched(config_for(storage, tiny_base_dir, name=name, **ours), **speeds)
        given = json.dumps(values | {"name": name})
        children.append(subprocess.Popen([sys.executable, "-c", PROMOTE, given], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE))
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    figures = [json.loads(child.communicate(timeout=300)[0].splitlines()[-1]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(found.get("promoted", True) for found in figures) == [False, True]
    assert {found["version"] for found in figures} == {1} and len({found["champion"] for found in figures}) == 1
    (other,) = (found for found in figures if "promoted" in found)
    assert "before models:/at-once/1 became champion" in other["why"]
    config = config_for(storage, tiny_base_dir, **ours)
    assert champion_number(config) == 1 and len(versions_of(config)) == 1


@pytest.mark.slow
def test_a_rolled_back_run_does_not_take_the_alias_back(tiny_base_dir: Path, storage: Path,
                                                        capfd: pytest.CaptureFixture[str]) -> None:
    """Nor does a dry run change anything; the page and the version say why."""
    config = config_for(storage, tiny_base_dir, name="one")
    benched(config, ngram=1.5)
    words = [f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32", "name=one"]
    assert run("promote", [*words, "--dry-run"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["champion"] == "ngram" and said["decision"]["contenders"][0]["gates"][0]["verdict"] == "passed"
    assert champion_number(config) is None and not (storage / "runs" / "one" / "promote").exists()
    first = run_promote(config)
    page = Path(first.outputs["decision"]).read_text(encoding="utf-8")
    assert page.startswith("# ngram becomes champion\n") and "| ngram (wins) |" in page and "| plain |" in page
    assert "<table>" in Path(first.outputs["decision"]).with_suffix(".html").read_text(encoding="utf-8")
    assert json.loads(Path(first.outputs["decision"]).with_suffix(".json").read_text(encoding="utf-8"))["winner"] == "ngram"
    tags = tags_of(config, 1)
    assert tags["gates"].startswith("lossless passed (8 of 8), acceptance passed (2.00)") and tags["lost"] == "none"
    (storage / "runs" / "one" / "promote" / "manifest.json").unlink()  # as a kill leaves it
    again = run_promote(config)
    assert again.figures["why"].endswith("(ngram): it was promoted from this bench") and again.figures["version"] == 1

    slower = config_for(storage, tiny_base_dir, name="two", promote__force=True)
    benched(slower, ngram=0.5)
    assert run_promote(slower).figures["champion"] == "plain" and champion_number(config) == 2
    assert run("promote", ["--rollback", f"storage={storage}"]) == 0 and champion_number(config) == 1
    stays = run_promote(config_for(storage, tiny_base_dir, name="two"))
    assert stays.figures["champion"] == "ngram" and not stays.figures["promoted"] and champion_number(config) == 1
    with pytest.raises(InputError, match="nothing to go back to"):
        run_promote(config_for(storage, tiny_base_dir, promote__rollback=True))
