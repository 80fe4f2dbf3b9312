"""The digest of the model that an application decodes, by which a batch recognises the right application."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra_core.base import BaseIdentity, context_limit, resolve_base
from hydra_core.errors import InputError
from hydra_core.storage import local_copy
from pipelines.config.serve import PLAIN
from pipelines.rows.schemas import content_id
from pipelines.runtime.artifacts import file_digest
from pipelines.serve.messages import AppArgs


@dataclass(frozen=True)
class ModelDigest:
    """Identifies what decodes: applications with equal digests give equal answers.

    `base`: `base_text`, the weight format included; `configuration`: digest of the folder's files, or `plain`.
    """

    base: str
    context_limit: int
    configuration: str

    @property
    def fingerprint(self) -> str:
        """`fp_BASE_CONFIGURATION`, two short digests: the `system_fingerprint` of every answer. Greedy answers depend on the
        first alone."""
        return f"fp_{content_id(self.base, self.context_limit)[:10]}_{content_id(self.configuration)[:10]}"

    def __str__(self) -> str:
        return f"base {self.base}, context {self.context_limit}, configuration {self.configuration[:12]}"


def base_text(identity: BaseIdentity, args: AppArgs) -> str:
    """The base as `ModelDigest` names it: vLLM's answers are other ones where rounding decides, and where tokens are drawn."""
    if args.vllm is None:
        return str(identity)
    further = args.vllm["arguments"]
    return f"{identity}:vllm{f':{content_id(further)[:10]}' if further else ''}"


def base_part(fingerprint: str | None) -> str | None:
    """The part of a `ModelDigest.fingerprint` that stands for the base; None for one of another kind."""
    parts = (fingerprint or "").split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "fp" else None


def model_digest(args: AppArgs) -> ModelDigest:
    """The digest of an application of `args`; no weights are loaded. Raises InputError for a missing base or folder."""
    model, cache = args.base["model"], Path(args.cache)
    resolved = resolve_base(model, cache)
    return ModelDigest(base_text(BaseIdentity(resolved.name, resolved.digest, args.base["dtype"]), args),
                   context_limit(model, cache=cache, asked=args.base["context_limit"]),
                   configuration_digest(args.configuration))


def configuration_digest(folder: str | Path | None) -> str:
    """Digest of the names and bytes in a configuration or heads folder; `plain` without one.

    Raises InputError for a missing folder.
    """
    if folder is None:
        return PLAIN
    root = local_copy(folder)
    if not root.is_dir():
        raise InputError(f"serve.model={folder}: no such folder")
    return content_id(*([path.relative_to(root).as_posix(), file_digest(path)]
                        for path in sorted(root.rglob("*")) if path.is_file()))
