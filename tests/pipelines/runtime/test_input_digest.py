"""An input that cannot be read is the user's mistake, and no fault of the storage."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hydra_core.errors import InputError
from pipelines.bench import inputs
from pipelines.config import RunConfig, load_config
from pipelines.distill.prompts import source_digest
from pipelines.runtime import artifacts
from pipelines.train.warm_start import start_digest


@pytest.mark.parametrize(("read", "field"), [
    (lambda config: source_digest(config.prompts), "prompts.path"),
    (lambda config: start_digest(config, "hydra"), "train.start.hydra"),
    (lambda config: inputs.bench_fingerprint(config, {}), "bench.prompts"),
    (lambda config: inputs._digest(Path(config.train.start["hydra"]) / "config.json"), "bench.heads")])
def test_an_input_that_cannot_be_read(read: Callable[[RunConfig], object], field: str, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    prompts, heads = tmp_path / "p.jsonl", tmp_path / "heads"
    heads.mkdir()
    for path in (prompts, heads / "config.json", heads / "model.safetensors"):
        path.write_text("{}", encoding="utf-8")
    config = load_config(None, {"storage": str(tmp_path), "bench.prompts": str(prompts), "prompts.source": "jsonl",
                                "prompts.path": str(prompts), "train.start": {"hydra": str(heads)}})
    monkeypatch.setattr(artifacts, "file_digest", denied)
    monkeypatch.setattr(inputs, "resolve_base", lambda *_: SimpleNamespace(digest="d"))
    with pytest.raises(InputError, match=rf"^{re.escape(field)}=\S+: cannot be read \(Permission denied\)$"):
        read(config)
