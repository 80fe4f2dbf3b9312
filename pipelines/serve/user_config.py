"""The heads of an application as Serve's `user_config`, which may change while the application runs."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hydra_core.base import Base, TextBase, WeightlessBase, load_vocabulary
from hydra_core.decoding import Engine, load_heads, read_configuration
from hydra_core.decoding.configuration import FILE
from hydra_core.errors import InputError
from hydra_core.interop import VllmEngine, VllmSettings, export_once, speculative_of
from hydra_core.proposers import Drafter, kind_of
from hydra_core.storage import local_copy
from hydra_core.tree import TreeSet
from pipelines.config import BaseSection
from pipelines.config.serve import PLAIN
from pipelines.profiling.cost_cache import known_costs, machine_costs
from pipelines.serve.messages import AppArgs
from pipelines.serve.model_identity import configuration_digest

DRAFT_SLOTS = 64
"""Room for draft nodes of a sequence: as many as the largest recorded step has, and more than any tree that is made here."""


@dataclass(frozen=True)
class Heads:
    """`configuration`: a folder, None: plain decoding; `version`: of a registered model; `digest`: of the folder's files, None:
    any files; `restored`: asked for after others were rejected, which stays told."""

    configuration: str | None
    label: str
    version: int | None = None
    digest: str | None = None
    restored: bool = dataclasses.field(default=False, compare=False)

    @staticmethod
    def of(values: dict[str, Any]) -> Heads:
        """Read a `user_config`. Raises InputError for an unknown or missing field, or one of another type."""
        known = {field.name for field in dataclasses.fields(Heads)}
        if unknown := sorted(set(values) - known):
            raise InputError(f"user_config.{unknown[0]}: unknown field; known are {', '.join(sorted(known))}")
        for name, kind in (("configuration", str), ("label", str), ("version", int), ("digest", str), ("restored", bool)):
            if type(values.get(name)) not in (kind, type(None)):
                raise InputError(f"user_config.{name}={values[name]!r}: is not of type {kind.__name__}")
        if not {"configuration", "label"} <= set(values) or values["label"] is None:
            raise InputError("user_config: needs configuration (a folder, or null to decode plainly) and label")
        return Heads(**values)

    def in_args(self) -> dict[str, Any]:
        """The fields of `AppArgs` that say these heads."""
        return {name: value for name, value in asdict(self).items() if name != "restored"}

    def check_digest(self) -> str:
        """The digest of the folder now. Raises InputError when another one was deployed."""
        found = configuration_digest(self.configuration)
        if self.digest is not None and found != self.digest:
            raise InputError(f"{self.configuration}: its files have digest {found[:12]}, but {self.digest[:12]} was deployed: "
                             "were they changed in place? Promote again")
        return found


def heads_of(args: AppArgs, restored: bool = False) -> dict[str, Any]:
    """The `user_config` of an application."""
    return asdict(Heads(args.configuration, args.label, args.version, args.digest, restored))


def without_heads(args: AppArgs) -> AppArgs:
    """The arguments that do not change while an application runs, without heads and keys: Serve replaces a replica when its
    arguments change."""
    return replace(args, configuration=None, label="", version=None, digest=None, api_key_digests=())


def load_drafter(heads: Heads, base: Base, args: AppArgs, timing: bool = True) -> tuple[Drafter | None, TreeSet | None, str]:
    """The drafter and trees of `heads`, and the digest of the files that they were made from. `timing`: measure this machine's
    step costs where they are not known yet. Raises InputError for another base, changed files, and heads that do not load."""
    digest = heads.check_digest()
    costs = partial(machine_costs if timing else known_costs, base, Path(args.cache))
    drafter, trees = load_heads(heads.configuration, base, costs) if heads.configuration else (None, None)
    if args.shared_answers:
        drafter = kind_of(drafter).sharing_answers(args.shared_answers)
    if heads.check_digest() != digest:
        raise InputError(f"{heads.configuration}: its files changed while they were loaded: promote again")
    return drafter, trees, digest


def load_app_base(args: AppArgs) -> TextBase:
    """The base of an application: a `Base`, or a `WeightlessBase` where vLLM loads the weights."""
    section = BaseSection(**args.base)
    return section.load(args.cache) if args.vllm is None else section.load_weightless(args.cache)


def start_vllm(heads: Heads, base: WeightlessBase, args: AppArgs) -> tuple[VllmEngine, str]:
    """vLLM with `heads`, exported where they are not yet, and the digest of the files that they were made from. Raises InputError
    as `load_drafter` does, for heads that vLLM cannot run, and where it does not start."""
    assert args.vllm is not None
    settings, digest, speculative = VllmSettings(**args.vllm), heads.check_digest(), None
    if heads.configuration is not None and not decodes_plainly(heads.configuration):
        vocabulary = load_vocabulary(args.base["model"], dtype=args.base["dtype"], cache=Path(args.cache))
        export = export_once(heads.configuration, vocabulary, Path(args.cache))
        speculative = speculative_of(export, settings.num_speculative_tokens)
    return VllmEngine(base, settings, max_batch_size=args.max_batch_size, speculative=speculative), digest


def decodes_plainly(folder: str) -> bool:
    """Whether `folder` holds a configuration without a drafter."""
    found = local_copy(folder)
    return (found / FILE).exists() and read_configuration(found).drafter == PLAIN


def make_engine(base: Base, drafter: Drafter | None, trees: TreeSet | None, args: AppArgs) -> Engine:
    """A new engine, in which any drafter has room."""
    return Engine(base, drafter, trees, max_batch_size=args.max_batch_size, draft_slots=DRAFT_SLOTS,
                  prefix_cache=args.prefix_cache_tokens)
