"""`hydra-heads cluster`: what it prints, what it writes, and one line for a mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs import cli, cluster
from tests.conftest import ROOT

LLAMA = str(ROOT / "jobs" / "configs" / "cluster_llama_8b.yaml")
STORAGE = "storage=/mnt/shared/hydra-heads"


def test_a_part_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "--config", LLAMA, "train", "service", "cluster.namespace=ours"]) == 0
    found = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [one["kind"] for one in found] == ["RayJob", "RayService", "PodDisruptionBudget", "CronJob"]
    assert {one["metadata"]["namespace"] for one in found} == {"ours"}
    assert cli.main(["cluster", "secrets", STORAGE]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/sh\n")


def test_all_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster.main(["--write", str(tmp_path / "mine"), STORAGE]) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(f"files below {tmp_path}/mine\n")
    assert {path.name for path in (tmp_path / "mine" / "overlays").iterdir()} == {"cpu-test"}  # no GPUs: no other overlay
    assert os.access(tmp_path / "mine" / "create_secrets.sh", os.X_OK)
    assert cluster.main(["--write", "/proc/nowhere", STORAGE]) == 1
    assert re.fullmatch(r"error: cluster: /proc/\S+ cannot be read or written \(.+\)\n", capsys.readouterr().err)


@pytest.mark.parametrize(("words", "told"), [
    ([], "cluster: say what to print (platform, jobs, service, secrets or a job, as train), or --write FOLDER"),
    (["nightly", STORAGE], "cluster nightly: there is no such part: choose from platform, jobs, service, secrets, chain"),
    (["ablate", STORAGE], "cluster ablate: there is no such part"),
    (["train", "storage=/home/me"], "storage=/home/me: pods have a shared volume at cluster.mount=/mnt/shared: set storage="),
    (["train", STORAGE, "cluster.gpu=8"], "cluster.gpu: unknown field; did you mean cluster.gpu"),
    (["train", STORAGE, "cluster.namespace=Ours"], "cluster.namespace: "),
    (["train", STORAGE, "cluster.min_nodes=3", "cluster.max_nodes=2"], "cluster.min_nodes=3 is more than cluster.max_nodes=2"),
    (["train", STORAGE, "cluster.batch_output=answers"], "cluster.batch_output: needs {partition} in it"),
    (["train", STORAGE, "--config"], "expected one argument"),
    (["train", "--config", LLAMA, "cluster.gpus=4"], "distill.workers: 8 x 1 GPUs do not fit on 1 node(s) of 4: set "),
    (["train", STORAGE, "train.workers.count=[3,2]"], "train.workers.count=[3,2]: the first is more than the second"),
    (["train", STORAGE, "--nope"], "--nope")])
def test_a_mistake_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and told in err


def test_other_heads_are_a_change_of_the_user_config_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So the operator changes the heads of the running endpoint, and no replica is replaced."""
    texts = []
    for model in ("/mnt/shared/one", "/mnt/shared/two"):
        assert cli.main(["cluster", "--config", LLAMA, "service", f"serve.model={model}"]) == 0
        texts.append(capsys.readouterr().out.splitlines())
    differing = {(left.strip(), right.strip()) for left, right in zip(*texts, strict=True) if left != right}
    assert differing == {(f"{name}: /mnt/shared/one", f"{name}: /mnt/shared/two") for name in ("configuration", "label")}


def test_a_model_of_the_registry_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """By version and digest: what is applied is what was looked at, also when somebody promotes meanwhile."""
    from pipelines.serve.model_identity import configuration_digest
    from pipelines.tracking import lookup

    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(lookup, "find_model", lambda config, asked: lookup.Model(tmp_path / "heads", f"{asked} (version 3)", 3))
    assert cli.main(["cluster", "service", STORAGE, "serve.model=models:/mine@champion"]) == 0
    service = next(yaml.safe_load_all(capsys.readouterr().out))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    heads = application["deployments"][0]["user_config"]
    assert (heads["configuration"], heads["version"]) == (str(tmp_path / "heads"), 3)
    assert heads["label"] == "models:/mine@champion (version 3)"
    assert heads["digest"] == configuration_digest(str(tmp_path / "heads"))


def test_a_model_that_is_not_registered_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"storage={tmp_path}/s", f"cluster.mount={tmp_path}", "serve.model=models:/nobody@champion"]
    assert cli.main(["cluster", "service", *words]) == 2
    assert "serve.model=models:/nobody@champion: is not registered" in capsys.readouterr().err


def test_bundled_heads_lie_where_the_image_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cluster", "service", STORAGE, "serve.model=bundled"]) == 0
    service = next(yaml.safe_load_all(capsys.readouterr().out))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    folder = application["deployments"][0]["user_config"]["configuration"]
    assert folder.startswith("/opt/hydra-heads/hydra_core/bundled/")
    assert (ROOT / Path(folder).relative_to("/opt/hydra-heads")).is_dir()


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.cluster", "train"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "HYDRA_HEADS_STORAGE": "/mnt/shared/x"})
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["kind"] == "RayJob", done.stderr
