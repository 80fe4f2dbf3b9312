"""Draft heads without memory: built by the code that builds them for training, so a new kind needs no formula here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from hydra_core.base.formats import DTYPES
from hydra_core.bundled import FOLDER as BUNDLED_FOLDER
from hydra_core.bundled import is_bundled
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig, build_drafter
from pipelines.config import RunConfig
from pipelines.config.serve import PLAIN
from pipelines.sizing.base import META, BaseShape

DRAFT_ID_BYTES = 8


@dataclass(frozen=True)
class HeadsShape:
    """`drafter`: the heads on torch's meta device; `parameters`: trained ones; `draft_vocab`: tokens that they may draft."""

    config: HeadsConfig
    drafter: HeadDrafter
    parameters: int
    draft_vocab: int

    def weight_bytes(self, item: int) -> int:
        """Bytes of the trained tensors and of the vocabulary rows that they copy, with `item` bytes a value."""
        return (self.parameters + self.drafter.rows.weight.numel()) * item

    def saved_bytes(self, item: int) -> int:
        """Bytes of `model.safetensors` of a heads folder, without its header."""
        return self.parameters * item + self.draft_vocab * DRAFT_ID_BYTES


@lru_cache(maxsize=64)  # several stages size the same heads
def heads_shape(base: BaseShape, config: HeadsConfig) -> HeadsShape:
    """The heads that `config` makes on `base`."""
    size = min(config.draft_vocab_size or base.vocab_size, base.vocab_size)
    vocab = DraftVocab(torch.arange(size), base.vocab_size)
    with META:
        drafter = build_drafter(config, base.vocabulary(), vocab)
    drafter.to(DTYPES[base.dtype])  # as decoders hold them
    return HeadsShape(config, drafter, sum(tensor.numel() for tensor in drafter.parameters()), size)


def heads_of_model(config: RunConfig, base: BaseShape, model: str | None) -> tuple[HeadsShape | None, str]:
    """The heads that `serve.model` and such settings name, and a note where they are assumed; None for plain decoding."""
    if model == PLAIN:
        return None, ""
    folder = next(iter(BUNDLED_FOLDER.glob("*/heads")), None) if is_bundled(model) else Path(model) if model else None
    for candidate in (folder, folder / "heads") if folder else ():
        if (found := _read_heads(candidate / "config.json")) is not None:
            return heads_shape(base, found), ""
    largest = max((heads_shape(base, heads) for heads in config.train.drafters.values()), key=lambda shape: shape.parameters,
                  default=None)
    return largest, "the heads are not known before they are loaded: the largest of train.drafters is assumed"


def _read_heads(path: Path) -> HeadsConfig | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return HeadsConfig.model_validate(values["heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
