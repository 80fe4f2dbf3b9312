"""What is written down beside every output, and what is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.runtime.provenance import HIDDEN, provenance, redacted, shareable_yaml, without_credentials
from tests.conftest import ROOT
from tests.pipelines.runtime.test_commit import git


def test_config_code_versions_machine(tmp_path: Path) -> None:
    found = provenance(load_config(None, {"storage": str(tmp_path), "train.lr": 0.5}))
    assert found["config"]["train"]["lr"] == 0.5 and found["config"]["bench"]["max_new_tokens"] == 64  # defaults too
    assert found["versions"]["torch"] and found["versions"]["ray"] and found["cpus"]
    if (ROOT / ".git").exists():
        assert found["git"]["commit"] == git(ROOT, "rev-parse", "HEAD")
    assert found["hardware"]["cpu"] == found["processor"] and found["hardware"]["digest"]
    json.dumps(found)


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hydra-heads", "tracking.password=hunter2", "tracking.uri=http://me:hunter2@host/",
                                      "bench.max_new_tokens=5"])
    config = load_config(None, {"storage": str(tmp_path), "tracking.uri": "http://me:hunter2@host:5000"})
    text = json.dumps(provenance(config))
    assert "hunter2" not in text and "http://host:5000" in text and "bench.max_new_tokens=5" in text
    path = tmp_path / "config.yaml"
    path.write_text(shareable_yaml(config), encoding="utf-8")
    assert "hunter2" not in path.read_text(encoding="utf-8")
    assert load_config(str(path)).tracking.uri == "http://host:5000"


def test_what_counts_as_a_secret() -> None:
    values = {"api_key": "k", "hf_token": "t", "max_new_tokens": 5, "nested": [{"password": "p"}], "secret": ""}
    assert redacted(values) == {"api_key": HIDDEN, "hf_token": HIDDEN, "max_new_tokens": 5,
                                "nested": [{"password": HIDDEN}], "secret": ""}
    assert without_credentials("postgresql://u:p@db/x and http://a@b") == "postgresql://db/x and http://b"
    assert without_credentials("postgresql://db/x?user=u&password=p&sslmode=on") == (
        f"postgresql://db/x?user=u&password={HIDDEN}&sslmode=on")


@pytest.mark.parametrize(("text", "shown"), [
    ("postgresql://u:p/w@host/db", "postgresql://host/db"), ("mysql+pymysql://u:p@ss/w@host:3306/db", "mysql+pymysql://host:3306/db"),
    ("postgresql://u:p?w@host/db", "postgresql://host/db"), ("postgresql://u:p@host/db?mail=a@b", "postgresql://host/db?mail=a@b"),
    ("postgresql://u@host/db", "postgresql://host/db"), ("http://u:p@ss@host/x", "http://host/x"),
    ("HTTPS://u:p@ss@host/x", "HTTPS://host/x"), ("failed: http://u:p@h:1/a and http://v:q@h/b", "failed: http://h:1/a and http://h/b"),
    *((same, same) for same in (
        "http://host/models@x", "http://host:5000/models@x", "https://host/x?of=a@b", "s3://bucket/a@b/c", "file:///data/a:b@c/d",
        "sqlite:////home/me@work/mlflow.db", "models:/heads@champion", "postgresql://[::1]:5432/db"))])
def test_passwords_with_any_characters(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
