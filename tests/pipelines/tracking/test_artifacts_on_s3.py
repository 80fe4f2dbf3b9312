"""Artifacts of a registered version where the storage is a bucket: every node reads them there."""

from __future__ import annotations

from pathlib import Path

from hydra_core import storage
from hydra_core.storage import as_path, listing, local_copy
from pipelines.config import load_config
from pipelines.tracking.registry import _downloaded


def test_artifacts_are_copied_to_the_bucket_once_and_whole(s3: str, tmp_path: Path) -> None:
    """As from an MLflow server, which no other node need reach. What a kill has left of a copy is none."""
    config = load_config(None, {"storage": f"{s3}/runs", "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    source = tmp_path / "artifacts" / "configuration"
    (source / "heads").mkdir(parents=True)
    for name in ("configuration.json", "heads/config.json", "heads/model.safetensors"):
        (source / name).write_text(name, encoding="utf-8")
    place = as_path(f"{s3}/runs/cache/models/hydra-heads/1")
    copied = _downloaded(config, str(source), place)
    names = {"configuration.json", "heads/config.json", "heads/model.safetensors"}
    assert copied.name == "configuration" and listing(copied).keys() == names
    written = {name: about.written for name, about in listing(copied).items()}
    assert _downloaded(config, str(source), place) == copied
    assert {name: about.written for name, about in listing(copied).items()} == written
    (marker,) = [name for name in listing(place) if name.endswith(".whole")]
    storage.remove(place / marker)
    storage.remove(copied / "heads/model.safetensors")
    assert listing(_downloaded(config, str(source), place)).keys() == names
    assert (local_copy(copied) / "heads" / "config.json").read_text(encoding="utf-8") == "heads/config.json"
