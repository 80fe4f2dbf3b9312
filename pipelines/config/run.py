"""One typed configuration for every stage: a YAML file, then dotted overrides; an unknown field is an error.

The models of this package hold all defaults. Every stage receives the whole `RunConfig` and reads its own section.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from hydra_core.errors import InputError
from hydra_core.storage import as_path, check_scheme, scheme_of, without_keys
from pipelines.config.ablate import AblateSection
from pipelines.config.base import BaseSection, TrackingSection
from pipelines.config.batch import BatchSection
from pipelines.config.bench import BenchSection, PromoteSection
from pipelines.config.cluster import ClusterSection
from pipelines.config.compare import CompareSection
from pipelines.config.curve import CurveSection
from pipelines.config.datacard import DatacardSection
from pipelines.config.distill import DistillSection, PromptsSection
from pipelines.config.generate import GenerateSection
from pipelines.config.load import LoadSection
from pipelines.config.loop import LoopSection
from pipelines.config.reference import nearest_setting
from pipelines.config.section import HIDDEN, Section
from pipelines.config.serve import ServeSection
from pipelines.config.train import TrainSection
from pipelines.config.tree import DraftModelSection, NgramSection, TreeSection
from pipelines.config.vllm import VllmSection

STORAGE_VARIABLE = "HYDRA_HEADS_STORAGE"
log = logging.getLogger(__name__)


def _default_storage() -> str:
    try:
        return os.environ.get(STORAGE_VARIABLE) or str(Path.home() / ".hydra-heads")
    except RuntimeError:  # a user without a home, as in a container
        raise InputError(f"storage: this user has no home folder: give storage=FOLDER or set {STORAGE_VARIABLE}") from None


class RunConfig(Section):
    """Everything one chain of stages needs."""

    name: str = Field("default", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
                      description="name of the run and of its folder")
    storage: str = Field(
        default_factory=_default_storage,
        validate_default=True,
        description="root folder of all outputs, the cache and the tracking database; absolute, or a URI (s3://, gs://, abfs://)",
        json_schema_extra={"default_text": f"~/.hydra-heads, or {STORAGE_VARIABLE}"})
    ray_address: str | None = Field(None, description="cluster to join; default: RAY_ADDRESS, else a local one is started")
    engine: Literal["own", "vllm"] = Field(
        "own", description="what runs the base where answers are written (distill, batch, serve): this project's engine, or vLLM "
                           "(section vllm), for GPUs, for bases beyond one of them and for hundreds of requests at once")
    base: BaseSection = BaseSection()
    vllm: VllmSection = VllmSection()
    prompts: PromptsSection = PromptsSection()
    distill: DistillSection = DistillSection()
    train: TrainSection = TrainSection()
    tree: TreeSection = TreeSection()
    ngram: NgramSection = NgramSection()
    draft_model: DraftModelSection = DraftModelSection()
    bench: BenchSection = BenchSection()
    compare: CompareSection = CompareSection()
    promote: PromoteSection = PromoteSection()
    ablate: AblateSection = AblateSection()
    curve: CurveSection = CurveSection()
    datacard: DatacardSection = DatacardSection()
    generate: GenerateSection = GenerateSection()
    serve: ServeSection = ServeSection()
    batch: BatchSection = BatchSection()
    load: LoadSection = LoadSection()
    loop: LoopSection = LoopSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()

    @field_validator("storage")
    @classmethod
    def _storage_is_absolute(cls, value: str) -> str:
        if scheme_of(value) is not None:
            try:
                return check_scheme(value)
            except ValueError as error:
                raise ValueError(f"{without_keys(value)}: {error}") from None
        expanded = os.path.expandvars(os.path.expanduser(value))
        if not os.path.isabs(expanded):
            raise ValueError(f"must be an absolute path, got {value!r} (storage= or {STORAGE_VARIABLE}): a submitted job "
                             "runs in an unpacked copy")
        return expanded


def load_config(path: str | None = None, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read YAML at `path` (or take the defaults), apply dotted `overrides` and check the result.

    Raises InputError naming the file and field for a missing file, broken YAML, an unknown field or a bad value.
    """
    values = _without_hidden(_read_yaml(path), path) if path else {}
    _refuse_two_names(overrides or {})
    for dotted, value in (overrides or {}).items():
        _set_dotted(values, dotted, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(_one_line(error, path)) from None


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.field=value`; the value is read as YAML. Raises InputError when there is no `=`."""
    dotted, separator, value = text.partition("=")
    if not separator or not dotted.strip():
        raise InputError(f"override {text!r}: write it as section.field=value")
    try:
        # outside quotes and brackets YAML takes what follows ` #` for a comment, and in an override nobody writes one
        commented = re.search(r"(^|\s)#", value) is not None and value.lstrip()[:1] not in ("'", '"', "[", "{")
        return dotted.strip(), value if commented else _number(yaml.safe_load(value))
    except yaml.YAMLError:
        return dotted.strip(), value


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, defaults included, as YAML that `load_config` reads back."""
    return str(yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False))


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = as_path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config {path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"config {path}: is not UTF-8 text") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"config {path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"config {path}: must be a mapping of sections, got {type(values).__name__}")
    return values


def _without_hidden(values: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    """`values` without those that an earlier version hid when it recorded them, each with a warning."""
    for name, value in values.items():
        if value == HIDDEN:
            log.warning("config %s: %s%s was not recorded: give it again if it is needed", path, prefix, name)
    return {name: _without_hidden(value, path, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in values.items() if value != HIDDEN}


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise InputError(f"override {dotted}: {name} is a value, not a section")
        node = child
    now = present_name(dotted)
    for name in [name for name in node if name != last and present_name(".".join((*parents, str(name)))) == now]:
        del node[name]  # an override wins over the file, whichever name either uses
    node[last] = value


def present_name(dotted: str) -> str:
    """`section.setting` with the name that the setting has now."""
    section, _, name = dotted.partition(".")
    field = RunConfig.model_fields.get(section)
    return f"{section}.{getattr(field.annotation, 'renamed', {}).get(name, name)}" if field and name else dotted


def _refuse_two_names(overrides: dict[str, Any]) -> None:
    seen: dict[str, str] = {}
    for dotted in overrides:
        if (other := seen.setdefault(present_name(dotted), dotted)) != dotted:
            earlier, now = sorted((dotted, other), key=lambda name: present_name(name) == name)
            raise InputError(f"override {earlier}: is the earlier name of {now}: give one of them")


def _number(value: Any) -> Any:
    """YAML reads `1e-3` as text because it has no dot; people mean a number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_line(error: ValidationError, path: str | None) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "config"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        near = nearest_setting(field, RunConfig)
        message = "unknown field" + (f"; did you mean {near}?" if near else "")
    where = f"config {path}" if path else "config"
    return f"{where}: {field}: {message}"
