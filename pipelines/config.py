"""One typed configuration for every stage: YAML file, then dotted overrides, unknown fields refused.

Defaults stand here and nowhere else. Every stage receives the whole `RunConfig` and reads its own section.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from hydra_core.base.embedded import EMBEDDED_BASE
from hydra_core.drafters.config import HeadsConfig
from hydra_core.errors import InputError
from pipelines.config_ablate import AblateSection
from pipelines.config_batch import BatchSection
from pipelines.config_generate import GenerateSection
from pipelines.config_load import LoadSection
from pipelines.config_section import Section

STORAGE_VARIABLE = "HYDRA_HEADS_STORAGE"
Size = Annotated[int, Field(ge=1)]


class BaseSection(Section):
    """The frozen base model whose output is to come out faster."""

    model: str = Field(EMBEDDED_BASE, description="directory, hub id, .gguf file, or the embedded model")
    dtype: Literal["auto", "bf16", "fp32", "int4", "int4-lossy"] = Field(
        "bf16", description="weight format; part of the base's identity. auto: the fastest here of those that hold the "
                            "checkpoint's own values; int4: a Q4_1 checkpoint's own codes, on a CPU; int4-lossy: 4-bit "
                            "codes made of any other base, which change its answers")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    context_limit: int | None = Field(None, ge=2, description="tokens of prompt + answer; default: the model's own")


class PromptsSection(Section):
    """Where prompts come from."""

    source: Literal["self", "jsonl", "parquet", "datasets"] = Field(
        "self", description="self: the base writes user turns itself (Magpie); datasets: hub id or local folder")
    path: str | None = Field(None, description="file, folder or hub id; not used by source=self")
    field: str = Field("prompt", description="column that holds the prompt text (or `messages`, a chat)")
    split: str = "train"
    count: int | None = Field(None, ge=1, description="prompts wanted (source=self) or the first so many of the file")
    self_made: int = Field(0, ge=0, description="prompts that the base writes besides those of a file")
    starts: tuple[str, ...] = Field(
        ("",), min_length=1, description="what self-made prompts begin with, in turn: `Translate German to English:`, ...")
    max_tokens: int = Field(128, ge=4, description="longest self-made prompt, in tokens, its start not counted")
    temperature: float = Field(1.0, gt=0, description="of self-made prompts")
    seed: int = 0

    @model_validator(mode="after")
    def _path_matches_source(self) -> PromptsSection:
        if self.source != "self" and not self.path:
            raise ValueError(f"prompts.path is needed with prompts.source={self.source}")
        if self.source == "self" and self.path:
            raise ValueError("prompts.path has no effect with prompts.source=self: set prompts.source too")
        if self.source == "self" and self.self_made:
            raise ValueError("prompts.self_made is for prompts besides a file's: with prompts.source=self set prompts.count")
        return self


class Workers(Section):
    """What Ray reserves for each actor or worker, and the threads it really uses."""

    count: int = Field(1, ge=1)
    cpus: float = Field(0.5, ge=0, description="logical CPUs to reserve: a share, not a thread count")
    gpus: float = Field(0, ge=0)
    threads: int = Field(2, ge=1, description="torch threads in each")


class TrainWorkers(Workers):
    """Workers that step together: with the others' defaults, an override of one field would change the rest."""

    count: int = Field(2, ge=1)
    threads: int = Field(1, ge=1, description="torch threads in each")


class DistillSection(Section):
    """Prompts in; the base's own answers and hidden states out."""

    temperatures: tuple[float, ...] = Field((0.0, 1.0), min_length=1, description="one answer per prompt for each")
    max_new_tokens: int = Field(128, ge=1)
    seed: int = 0
    held_out: float = Field(0.1, gt=0, lt=1, description="share of prompts kept for validation, by prompt_id")
    workers: Workers = Workers()
    running_batch: int = Field(32, ge=1, description="rows decoded together by one worker")
    heads: str | None = Field(
        None, description="heads or configuration folder, or `shipped`, to decode with: the same rows, sooner")
    rows_per_file: int = Field(64, ge=1, description="rows a part file holds: what a kill can cost")
    features: Literal["all", "held_out"] = Field(
        "all", description="rows whose hidden states are stored; held_out: enough for train.features=online")
    feature_dtype: Literal["bf16", "fp32"] = "bf16"
    max_error_share: float = Field(0.05, ge=0, le=1)


class TrainSection(Section):
    """Draft heads on the distilled rows; the base stays frozen."""

    drafters: dict[str, HeadsConfig] = Field(
        default_factory=lambda: {
            "medusa": HeadsConfig(kind="medusa"),
            "hydra": HeadsConfig(kind="hydra"),
            "hydra++": HeadsConfig(kind="hydra++"),
        },
        description="name -> architecture; every one of them is trained unless `only` names one")
    only: str | None = Field(None, description="train just this drafter")
    start: dict[str, str] = Field(default_factory=dict, description="drafter -> heads folder, or `shipped`, whose weights it "
                                                                    "begins with: to go on with more rows; default: untrained")
    dry_run: bool = Field(False, description="train nothing: save untrained heads under `train-dry`, to try serving with")
    features: Literal["stored", "online"] = Field(
        "stored", description="hidden states as distill stored them; online: the base makes them in each worker")
    share: float = Field(1.0, gt=0, le=1, description="of the training rows that are learned from, told by their ids")
    cache_mb: int = Field(512, ge=1, description="stored hidden states each worker keeps; rows are shuffled in such windows")
    epochs: float = Field(4.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    rows_per_step: int = Field(16, ge=1, description="rows in one optimizer step, all workers together")
    learning_rate: float = Field(1e-3, gt=0, alias="lr")
    accumulate: int = Field(1, ge=1, description="pieces that each worker cuts its rows of a step into, one after the other")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="of lr after the warm-up; wsd: constant, then a straight line down")
    warmup_steps: int = Field(20, ge=0)
    decay_share: float = Field(0.2, gt=0, le=1, description="last share of all steps in which wsd goes down")
    final_lr_share: float = Field(0.1, ge=0, le=1, description="where cosine and wsd end, as a share of lr")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, which are validated and saved then; 0: none")
    stop_ratio: float = Field(4.0, gt=1, description="a loss so many times the first step's stops the run")
    grad_clip: float = Field(1.0, gt=0)
    seed: int = 0
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of the heads while they train")
    plain_losses: bool = Field(False, description="losses as they are written, every head with the base's whole softmax made "
                                                  "anew: the usual way, to compare with")
    workers: TrainWorkers = TrainWorkers()
    validate_every: int = Field(50, ge=1, description="steps between validations, each with a checkpoint")
    validation_rows: int = Field(64, ge=1)
    decode_every: int = Field(0, ge=0, description="steps between real decodings of held-out prompts by a task beside the "
                                                   "training, at validations; 0: none")
    decode_prompts: int = Field(8, ge=1, description="prompts that it decodes")
    decode_tokens: int = Field(64, ge=1, description="new tokens of each")
    decode_cpus: float = Field(0.25, ge=0, description="logical CPUs to reserve for it")
    max_failures: int = Field(2, ge=0, description="times Ray restarts dead workers from the last checkpoint")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _only_is_known(self) -> TrainSection:
        if self.only is not None and self.only not in self.drafters:
            raise ValueError(f"train.only={self.only!r} is none of train.drafters: {', '.join(self.drafters)}")
        if unknown := [name for name in self.start if name not in self.drafters]:
            raise ValueError(f"train.start: {unknown[0]!r} is none of train.drafters: {', '.join(self.drafters)}")
        if self.rows_per_step % (self.workers.count * self.accumulate):
            raise ValueError("train.rows_per_step must be a multiple of train.workers.count x train.accumulate")
        if self.plain_losses and any(heads.mask_lost for heads in self.drafters.values()):
            raise ValueError("train.plain_losses knows no mask_lost: turn one of them off")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas={list(self.betas)}: each must be at least 0 and below 1")
        if self.ema and self.zero_stage == 3:
            raise ValueError("train.ema averages whole weights, which ZeRO-3 keeps apart: set train.zero_stage to 2")
        return self


class TreeSection(Section):
    """The draft tree that pays best on this machine."""

    batch_sizes: tuple[Size, ...] = Field((1, 4, 16, 64), min_length=1)
    node_counts: tuple[Size, ...] = Field((1, 2, 3, 4, 6, 8, 9, 12, 16, 24, 32, 48), min_length=1,
                                          description="verify sizes to time, root included")
    context: int = Field(256, ge=1, description="committed tokens per row while timing")
    far_contexts: tuple[Size, ...] = Field((2048,), description="longer ones, over which a few sizes are timed")
    repeats: int = Field(5, ge=3)
    curves: bool = Field(False, description="also time steps up to the base's longest context, as a table and a picture")
    threads: int = Field(2, ge=1)
    max_rows: int = Field(128, ge=1, description="held-out rows walked")
    draft_vocab_sizes: tuple[Size, ...] = Field(
        (), description="smaller draft vocabularies to try with the same heads: the size that makes the most tokens a second "
                        "at the smallest batch is kept")


class NgramSection(Section):
    """Prompt lookup: drafts copied from where the last tokens stood before. Needs no training."""

    max_match: int = Field(3, ge=1)
    min_match: int = Field(2, ge=1)
    length: int = Field(15, ge=1, description="tokens drafted after a match, at most: fewer where they do not pay")

    @model_validator(mode="after")
    def _shortest_first(self) -> NgramSection:
        if self.min_match > self.max_match:
            raise ValueError(f"ngram.min_match={self.min_match} is more than ngram.max_match={self.max_match}")
        return self


class BenchSection(Section):
    """Every way of decoding on the same prompts in one run."""

    prompts: str | None = Field(None, description="JSONL of `prompt` or Spec-Bench's format; default: held-out prompts")
    heads: str | None = Field(None, description="one checkpoint folder, or `shipped`, to bench instead of this run's own")
    limit: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    rounds: int = Field(1, ge=1)
    methods: tuple[str, ...] = Field(
        (), description="contenders besides plain; empty: transformers, ngram, every drafter found and combined. More: "
                        "transformers-lookup; llama.cpp (a GGUF base, and llama-cpp-python); NAME@N, a drafter NAME with "
                        "the best fixed tree of at most N nodes")
    turns: int = Field(2, ge=1, description="turns of a question, at most; each further one follows plain's own answers")
    single: bool = Field(True, description="decode one request at a time; false: only identity and throughput")
    identity_prompts: int = Field(8, ge=0, description="prompts on which fp32 identity is checked for every drafter")
    identity_batch: int = Field(8, ge=0, description="also in a running batch of so many rows, staggered; 0: no")
    identity_formats: tuple[Literal["fp32", "bf16", "int4"], ...] = Field(
        ("fp32",), description="weight formats in which those are checked against the naive loop")
    batch_prompts: int = Field(0, ge=0, description="prompts decoded together for throughput; 0: not measured")
    running_batch: int = Field(32, ge=1, description="rows of that batch")
    batch_limits: tuple[Literal["equal", "ragged"], ...] = Field(
        ("equal", "ragged"), min_length=1, description="of its answers: max_new_tokens each, or drawn from 16 to 400")
    batch_job: bool = Field(False, description="in that, also the way of `batch` with what serve.model names (`batch`), beside "
                                               "the engine that it uses called directly (`engine`)")
    load: tuple[Size, ...] = Field(
        (), description="numbers of requests kept in flight, as [1,4,16,64]; empty: not measured")
    load_requests: int = Field(
        0, ge=0, description="requests sent in all at each of those; 0: four times as many, and at least 16")
    temperature: float = Field(0.0, ge=0, description="above 0 answers are sampled, and transformers is left out")
    shared_noise: bool = Field(True, description="rank drafts by the draws own noise")
    threads: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _load_is_reached(self) -> BenchSection:
        if 0 < self.load_requests < max(self.load, default=0):
            raise ValueError(f"bench.load_requests={self.load_requests} is fewer than the {max(self.load)} of bench.load "
                             "that are to be in flight at once")
        return self


class CompareSection(Section):
    """Benches side by side."""

    runs: tuple[str, ...] = Field((), description="MLflow run ids, or names of runs (`name=`): their latest bench")


class PromoteSection(Section):
    """Which configuration becomes `champion`."""

    model_name: str = "hydra-heads"
    alias: str = "champion"
    min_gain: float = Field(1.0, ge=0, description="speed against plain below which plain itself is promoted")


class ServeSection(Section):
    """The OpenAI-compatible endpoint."""

    model: str | None = Field(
        None, description="models:/NAME@alias, a folder, `shipped` or `plain`; default: champion, else the package's own heads")
    app_name: str = "hydra-heads"
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1, description="at least so many")
    max_replicas: int | None = Field(None, ge=1, description="at most so many, as answers in flight ask for; default: replicas")
    max_batch: int = Field(8, ge=1, description="rows one replica decodes together")
    max_queued: int = Field(256, ge=0, description="answers waiting for a row of a replica before 429")
    max_new_tokens: int = Field(1024, ge=1, description="most a request may ask for")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt; default: what the context leaves room for")
    max_body_bytes: int = Field(2**20, ge=1, description="longest request")
    drain_seconds: float = Field(120.0, ge=0, description="a replica that is to go has to finish what it has begun")
    api_keys_file: str | None = Field(
        None, description="keys that open the endpoint, one a line, with those in HYDRA_HEADS_API_KEYS; without any, all may ask")
    update: bool = Field(False, description="give the running application `model` to decode with, and end")
    workers: Workers = Workers(cpus=0.5, threads=2)

    @model_validator(mode="after")
    def _most_replicas(self) -> ServeSection:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"serve.max_replicas={self.max_replicas} is fewer than serve.replicas={self.replicas}")
        return self


class TrackingSection(Section):
    """MLflow."""

    uri: str | None = Field(None, description="default: MLFLOW_TRACKING_URI, else SQLite under storage")
    experiment: str = "hydra-heads"


class RunConfig(Section):
    """Everything one chain of stages needs."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run's folder")
    storage: str = Field(
        default_factory=lambda: os.environ.get(STORAGE_VARIABLE) or str(Path.home() / ".hydra-heads"),
        validate_default=True,
        description="absolute root of all outputs, the cache and the tracking database")
    ray_address: str | None = Field(None, description="cluster to join; default: RAY_ADDRESS, else a local one is started")
    base: BaseSection = BaseSection()
    prompts: PromptsSection = PromptsSection()
    distill: DistillSection = DistillSection()
    train: TrainSection = TrainSection()
    tree: TreeSection = TreeSection()
    ngram: NgramSection = NgramSection()
    bench: BenchSection = BenchSection()
    compare: CompareSection = CompareSection()
    promote: PromoteSection = PromoteSection()
    ablate: AblateSection = AblateSection()
    generate: GenerateSection = GenerateSection()
    serve: ServeSection = ServeSection()
    batch: BatchSection = BatchSection()
    load: LoadSection = LoadSection()
    tracking: TrackingSection = TrackingSection()

    @field_validator("storage")
    @classmethod
    def _storage_is_absolute(cls, value: str) -> str:
        expanded = os.path.expandvars(os.path.expanduser(value))
        if not os.path.isabs(expanded):
            raise ValueError(f"must be an absolute path, got {value!r} (storage= or {STORAGE_VARIABLE}): a submitted job "
                             "runs in an unpacked copy")
        return expanded


def load_config(path: str | None = None, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read YAML at `path` (or the defaults), lay dotted `overrides` over it and check the whole.

    Raises InputError naming the file and field for a missing file, broken YAML, an unknown field or a bad value.
    """
    values = _read_yaml(path) if path else {}
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
        return dotted.strip(), _number(yaml.safe_load(value))
    except yaml.YAMLError:
        return dotted.strip(), value


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, defaults included, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"config {path}: cannot be read ({error.strerror})") from None
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


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    node = values
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise InputError(f"override {dotted}: {name} is a value, not a section")
        node = child
    node[last] = value


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
        message = "unknown field"
    where = f"config {path}" if path else "config"
    return f"{where}: {field}: {message}"
