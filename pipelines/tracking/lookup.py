"""The model that `serve.model` or `generate.model` names: the drafter that decodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra_core.base import resolve_base
from hydra_core.bundled import BUNDLED, bundled_configuration, is_bundled
from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.config import RunConfig
from pipelines.config.serve import PLAIN
from pipelines.runtime.artifacts import RunPaths


@dataclass(frozen=True)
class Model:
    """A model to decode with. `folder`: a configuration or heads, None for plain decoding; `version`: of a registered model."""

    folder: Path | None
    label: str
    version: int | None = None


def find_model(config: RunConfig, asked: str | None, field: str = "serve.model") -> Model:
    """Find `models:/NAME@alias`, `models:/NAME/VERSION`, a folder, the bundled heads or `plain`.

    `asked`: the value of the setting `field`; None: the champion, or the bundled heads if nothing is promoted yet. Raises
    InputError for a model that is not registered, and if there are no bundled heads for this base; StoppedError for a registry
    that does not answer the question: other heads in place of the champion would be a surprise.
    """
    if asked == PLAIN:
        return Model(None, PLAIN)
    if is_bundled(asked):
        return _bundled(config)
    if asked is not None and not asked.startswith("models:/"):
        return Model(as_path(asked), asked)
    from pipelines.tracking.registry import NotRegistered, resolve  # MLflow, which bundled heads, folders and `plain` do without

    champion = f"models:/{config.promote.model_name}@{config.promote.alias}"
    try:
        version, folder = resolve(config, asked or champion, RunPaths.of(config).storage / "cache" / "models", field)
    except NotRegistered:
        if asked is not None or (found := _of_this_base(config)) is None:
            raise
        return _bundled_model(found)
    label = f"{asked} (version {version})" if asked else f"models:/{config.promote.model_name}/{version}"
    return Model(folder, label, version)


def bundled_heads(config: RunConfig) -> str | None:
    """The folder of the bundled heads for this base, or None."""
    found = _of_this_base(config)
    return None if found is None else str(found / "heads")


def _bundled(config: RunConfig) -> Model:
    if (found := _of_this_base(config)) is None:
        raise InputError(f"{BUNDLED}: no heads come with the package for base.model={config.base.model}: train some, or decode "
                         f"with `{PLAIN}`")
    return _bundled_model(found)


def _bundled_model(folder: Path) -> Model:
    return Model(folder, f"the package's own heads ({folder.name})")


def _of_this_base(config: RunConfig) -> Path | None:
    return bundled_configuration(resolve_base(config.base.model, RunPaths.of(config).cache).digest)
