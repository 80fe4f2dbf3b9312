"""What a transformers model does around its decoder layers, found by running its class on stand-in values.

Families scale their logits, cap them, or add one to the weights of their norms. The configuration has other names for these in
each family, so they are read off the class itself: it is built without weights, its layers and its vocabulary matrix are
replaced by functions that hand values on, and what comes out is compared with what went in.
"""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

log = logging.getLogger(__name__)

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm", "norm_f", "layer_norm", "embedding_norm")
"""Names of the norm after the last layer."""
VALUES = tuple(sign * 2.0**power for power in (-20, -10, -4, 0, 2, 4, 6, 30) for sign in (1, -1))
"""Stand-in logits, from those that no soft cap changes to those that any cuts off; exact in every dtype."""


@dataclass(frozen=True)
class Surroundings:
    """`scale`, `softcap`: a logit is softcap * tanh(scale * x / softcap) of its product x with the vocabulary matrix, or
    scale * x with softcap None; `norm_offset`: what the final norm adds to its weights; `embedding`, `norm`, `head`: the class's
    names of these tensors, empty where they are not known, `norm` None where there is none; `weights`: shapes of the tensors that
    a checkpoint holds, by name, without those that are copies of others."""

    scale: float = 1.0
    softcap: float | None = None
    norm_offset: float = 0.0
    embedding: str = ""
    norm: str | None = ""
    head: str = ""
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)


class _Values(BaseModelOutputWithPast):
    """What a decoder returns; the outputs that only some families have are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


def decoder_of(model: Any) -> Any:
    """The decoder layers of a causal model, with their embedding and final norm."""
    found = model.get_decoder()
    return getattr(model, "model", found) if found is model else found  # a few families do not tell their decoder


def final_norm(decoder: Any) -> Any | None:
    """The norm after the last layer, or None for a family with none of the usual names."""
    return next((getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name)), None)


def look_around(folder: Path) -> Surroundings:
    """Run the model class of the transformers folder `folder` on stand-in values. No weights are read.

    Of a class that cannot be run so, the usual is assumed. The comparison of the whole base with transformers' forward then finds
    out whether that is right.
    """
    try:
        return _look_around(folder)
    except Exception as error:  # a model class is a program of others
        log.debug("%s cannot be run on stand-in values: %s", folder, error)
        return Surroundings()


def _look_around(folder: Path) -> Surroundings:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = build(config, dtype=torch.float32, trust_remote_code=False)
    left_out = set(getattr(model, "all_tied_weights_keys", None) or ())
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    weights = {name: tuple(value.shape) for name, value in model.named_parameters()
               if name not in left_out and not any(pattern.search(name) for pattern in optional)}
    scale, softcap = _logits(model)
    norm = final_norm(decoder_of(model))
    if not isinstance(getattr(norm, "weight", None), Tensor):
        norm = None
    names = {id(value): name for name, value in model.named_parameters()}  # of a tied pair, the name that comes first
    embedding, head = (names[id(part.weight)] for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    return Surroundings(scale, softcap, _norm_offset(norm) if norm is not None else 0.0, embedding,
                        names[id(norm.weight)] if norm is not None else None, head, weights)


@torch.inference_mode()
def _logits(model: Any) -> tuple[float, float | None]:
    """Scale and soft cap; (1, None) where the logits are another function, which no comparison then accepts."""
    given = torch.tensor([VALUES, VALUES[::-1]])
    decoder, head = decoder_of(model), model.get_output_embeddings()
    decoder.forward = lambda *_, **__: _Values(last_hidden_state=given[None])
    head.forward = lambda hidden: hidden
    found = model(input_ids=torch.zeros(1, 2, dtype=torch.int64)).logits[0].float()
    at = dict(zip(VALUES, found[0].tolist(), strict=True))
    scale, largest = at[1.0], at[2.0**30]
    softcap = None
    if abs(largest / 2.0**30 - scale) > 1e-4 * abs(scale):
        scale, softcap = at[2.0**-10] * 2.0**10, largest
    fitted = given * scale if softcap is None else softcap * torch.tanh(given * scale / softcap)
    if not scale > 0 or not torch.allclose(found, fitted, rtol=1e-4, atol=1e-30):
        log.debug("the logits of %s are neither scaled nor capped: %s", type(model).__name__, at)
        return 1.0, None
    return (1.0 if abs(scale - 1) < 1e-6 else scale), softcap


@torch.inference_mode()
def _norm_offset(norm: Any) -> float:
    """1 for a norm that multiplies by 1 + weight, 0 for others: what comes out with weights of zero."""
    made: nn.Module = copy.deepcopy(norm).to_empty(device="cpu")
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.zero_()
    alternating = 1.0 - 2.0 * (torch.arange(len(norm.weight)) % 2)
    found: Tensor = made(alternating[None])
    return 1.0 if bool((found * alternating > 0.5).all()) else 0.0
