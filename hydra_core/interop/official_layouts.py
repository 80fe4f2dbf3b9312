"""How published Hydra, Hydra++ and Medusa heads are laid out, in terms of this project's heads.

Read from the code that writes them: github.com/zankner/Hydra (hydra/model/hydra_heads) and github.com/FasterDecoding/Medusa
(medusa/model). Letters: D width, V vocabulary, L blocks of a head; the names in brackets are in the files.

    Hydra      head i: L blocks, the first (i + 2) D wide with a projection and its bias [hydra_mlp.I.J.linear, .res_connection],
               then rows and a bias of its own [hydra_lm_head.I]; raw embeddings, no norm at the end
    Hydra++    the same over a Llama layer with its final norm [prefix_embeding_layer]; dropouts take every second number
               [hydra_mlp.I.2J+1, hydra_lm_head.I.1]
    ungrounded Hydra heads that read no tokens: Medusa with a bias in its rows
    Medusa     head i: L blocks D wide [I.J.linear], then rows of its own without a bias [I.L], or the base's rows
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.errors import InputError
from hydra_core.heads import DraftVocab, HeadDrafter, HeadsConfig
from hydra_core.heads.hydra_plus import HydraPlusPlus
from hydra_core.heads.registry import KINDS
from hydra_core.interop.official_files import OfficialTensors

MOST_HEADS = 16
CLOSE, TINY = 2**-7, 1e-6
"""Two roundings to bfloat16 or float16 of one value differ by no more: relatively, and near zero."""
PREFIX = "prefix_embeding_layer"  # spelt so in the files
THETA = 10000.0  # of rotary positions, in Hydra's code
OTHERS = {r"blocks\.\d+\.layers\.": "Medusa heads as vLLM names them",
          r"(medusa_head|model|base_model)\.": "a whole model with its heads", r"(fc|midlayer|d2t|layers\.0)\b": "EAGLE's layer"}
"""What other files hold, by the names of their tensors."""


@dataclass(frozen=True)
class Mapped:
    """Heads in this project's terms: `drafter` on torch's meta device, its `tensors` by name, and `notes` on what is unusual."""

    drafter: HeadDrafter
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Described:
    """What a config.json says. Numbers that are missing there are those of the classes that read it."""

    path: Path
    values: Mapping[str, Any]

    def number(self, name: str, default: int, least: int = 1) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or value < least:
            raise InputError(f"{self.path}: {name} must be a whole number of at least {least}, got {value!r}")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if type(value) is not bool:
            raise InputError(f"{self.path}: {name} must be true or false, got {value!r}")
        return value


def map_heads(found: OfficialTensors, described: Described, vocabulary: BaseVocabulary) -> Mapped:
    """The heads of `found` for the base of `vocabulary`, every tensor of the file used or compared with the base's.

    Raises InputError for heads of another kind or base, and for a tensor that is missing, unexpected or of another shape.
    """
    if "hydra_head_arch" in described.values or any(name.startswith("hydra_mlp.") for name in found.names):
        return _hydra(found, described, vocabulary)
    if any(re.match(r"\d+\.\d+\.linear\.", name) for name in found.names):
        return _medusa(found, described, vocabulary)
    other = next((what for pattern, what in OTHERS.items() if any(re.match(pattern, name) for name in found.names)), None)
    raise InputError(f"{found.path}: holds {other or 'no heads of a known kind'} (tensor {min(found.names)}): Hydra's and "
                     "Medusa's own files of heads are imported")


def _hydra(found: OfficialTensors, described: Described, vocabulary: BaseVocabulary) -> Mapped:
    values, where = described.values, described.path
    arch, grounded = values.get("hydra_head_arch", "mlp"), described.flag("grounded_heads")
    heads, layers = described.number("hydra_num_heads", 4), described.number("hydra_num_layers", 1)
    if arch not in ("mlp", "prefix-mlp"):
        raise InputError(f"{where}: hydra_head_arch={arch!r}: no kind of heads here computes it: mlp and prefix-mlp do")
    if offset := described.number("hidden_state_offset", 0, least=0):
        raise InputError(f"{where}: hidden_state_offset={offset}: these heads read an earlier layer, ours the last one")
    if arch == "prefix-mlp" and not grounded:
        raise InputError(f"{where}: prefix-mlp with grounded_heads=false: heads that read a prefix layer and no tokens, which no "
                         "kind here does")
    plus = arch == "prefix-mlp"
    last = ".1" if plus else ""
    _check_fit(found, f"hydra_lm_head.0{last}.weight", vocabulary)
    _check_count(found, described, heads, layers)
    drafter = _build("hydra++" if plus else "hydra" if grounded else "medusa", heads, layers, vocabulary, own_rows=True,
                     skip_bias=grounded)
    width = vocabulary.width
    tensors: dict[str, Tensor] = {}
    for i in range(heads):
        names = [f"hydra_mlp.{i}.{2 * j + 1 if plus else j}" for j in range(layers)]
        tensors |= _blocks(found, i, names, drafter.head_width(i), width)
        for part, shape in (("weight", (vocabulary.size, width)), ("bias", (vocabulary.size,))):
            tensors[f"own_rows.{i}.{part}"] = found.take(f"hydra_lm_head.{i}{last}.{part}", *shape)
    if isinstance(drafter, HydraPlusPlus):
        tensors |= _prefix(found, drafter, vocabulary, where)
    notes = _compare_embedding(found, described, vocabulary)
    found.check_all_taken(f"config.json describes {heads} heads of {layers} blocks, hydra_head_arch={arch}, grounded_heads="
                          f"{str(grounded).lower()}")
    return Mapped(drafter, tensors, notes)


def _medusa(found: OfficialTensors, described: Described, vocabulary: BaseVocabulary) -> Mapped:
    """The published Vicuna folders say 2 heads and hold 5, and are read as 5 by the code that they belong to: more heads than
    described are taken, with a note."""
    there = len({name.split(".")[0] for name in found.names if re.match(r"\d+\.", name)})
    said, layers = described.number("medusa_num_heads", there), described.number("medusa_num_layers", 1)
    heads = max(said, there)
    own = found.shape(f"0.{layers}.weight") is not None
    _check_fit(found, f"0.{layers}.weight" if own else "0.0.linear.weight", vocabulary)
    _check_count(found, described, heads, layers)
    drafter = _build("medusa", heads, layers, vocabulary, own_rows=own)
    width = vocabulary.width
    tensors: dict[str, Tensor] = {}
    for i in range(heads):
        tensors |= _blocks(found, i, [f"{i}.{j}" for j in range(layers)], width, width)
        if own:
            rows = found.take(f"{i}.{layers}.weight", vocabulary.size, width)
            tensors |= {f"own_rows.{i}.weight": rows, f"own_rows.{i}.bias": rows.new_zeros(len(rows))}
    found.check_all_taken(f"config.json describes heads of {layers} blocks, {'with' if own else 'without'} vocabulary rows")
    notes = _base_is_not_shown(described)
    if heads > said:
        notes += (f"config.json says {said} heads and the file holds {heads}: all are imported",)
    return Mapped(drafter, tensors, notes)


def _check_count(found: OfficialTensors, described: Described, heads: int, layers: int) -> None:
    """Raise InputError for more heads than are supported, and for more blocks than there are tensors, before any are made."""
    if heads > MOST_HEADS:
        raise InputError(f"{described.path}: {heads} heads are more than the {MOST_HEADS} that are supported")
    if heads * layers > len(found.names):
        raise InputError(f"{described.path}: describes {heads} heads of {layers} blocks, and {found.path.name} holds "
                         f"{len(found.names)} tensors")


def _build(kind: Literal["medusa", "hydra", "hydra++"], heads: int, layers: int, vocabulary: BaseVocabulary, own_rows: bool,
           skip_bias: bool = False) -> HeadDrafter:
    """Heads without memory, as published: no final norm, raw embeddings, the whole vocabulary."""
    config = HeadsConfig(kind=kind, num_heads=heads, num_blocks=layers, draft_vocab_size=0, normalise_embeddings=False,
                         final_norm=False, own_rows=own_rows, skip_bias=skip_bias)
    vocab = DraftVocab(torch.arange(vocabulary.size), vocabulary.size)
    with torch.device("meta"):
        return KINDS[kind](config, vocabulary, vocab)


def _blocks(found: OfficialTensors, i: int, names: list[str], width_in: int, width: int) -> dict[str, Tensor]:
    """The blocks of head `i`, the first of which reads `width_in` numbers."""
    tensors = {}
    for j, name in enumerate(names):
        wide = width_in if j == 0 else width
        for ours, theirs in {"inner": "linear", "skip": "res_connection"}.items():
            if ours == "inner" or wide != width:
                tensors[f"heads.{i}.blocks.{j}.{ours}.weight"] = found.take(f"{name}.{theirs}.weight", width, wide)
                tensors[f"heads.{i}.blocks.{j}.{ours}.bias"] = found.take(f"{name}.{theirs}.bias", width)
    return tensors


def _prefix(found: OfficialTensors, drafter: HydraPlusPlus, vocabulary: BaseVocabulary, where: Path) -> dict[str, Tensor]:
    """The Llama layer and its final norm. Its embedding table, which nothing reads, is left out."""
    theta = _check_llama(vocabulary, where)
    ours, width, layer = drafter.prefix, vocabulary.width, f"{PREFIX}.layers.0"
    queries, keys = ours.query_heads * ours.head_width, ours.kv_heads * ours.head_width
    inner = ours.down.in_features
    attention = [found.take(f"{layer}.self_attn.{name}_proj.weight", rows, width)
                 for name, rows in (("q", queries), ("k", keys), ("v", keys))]
    gates = [found.take(f"{layer}.mlp.{name}_proj.weight", inner, width) for name in ("gate", "up")]
    tensors = {"qkv": torch.cat(attention), "output": found.take(f"{layer}.self_attn.o_proj.weight", width, queries),
               "gate_up": torch.cat(gates), "down": found.take(f"{layer}.mlp.down_proj.weight", width, inner),
               "input_norm": found.take(f"{layer}.input_layernorm.weight", width),
               "mlp_norm": found.take(f"{layer}.post_attention_layernorm.weight", width),
               "norm": found.take(f"{PREFIX}.norm.weight", width)}
    found.take_optional(f"{PREFIX}.embed_tokens.weight", vocabulary.size, width)
    table = f"{layer}.self_attn.rotary_emb.inv_freq"
    turns = found.take_optional(table, ours.head_width // 2)
    if turns is None and theta != THETA:
        raise InputError(f"{found.path}: has no tensor {table}, and rope_theta of base {vocabulary.identity.name} is {theta}: "
                         f"the published code knows {THETA:g} alone, so the prefix layer's frequencies cannot be told")
    if turns is not None and not torch.allclose(turns.float(), ours.frequencies, rtol=CLOSE, atol=0.0):
        raise InputError(f"{found.path}: tensor {table}: the prefix layer's rotary frequencies are "
                         f"not those of base {vocabulary.identity.name}")
    return {f"prefix.{name}.weight": tensor for name, tensor in tensors.items()}


def _check_llama(vocabulary: BaseVocabulary, where: Path) -> float:
    """The base's rope_theta. Raises InputError unless a Llama layer of its configuration is what our prefix layer computes."""
    config = vocabulary.config
    rope = getattr(config, "rope_parameters", None) or {}
    kept = {"hidden_act": (getattr(config, "hidden_act", "silu"), ("silu", "swish")),
            "rope_type": (rope.get("rope_type", "default"), ("default",)),
            "partial_rotary_factor": (rope.get("partial_rotary_factor") or 1.0, (1.0,)),
            "rope_parameters": ("for each kind of layer" if any(isinstance(one, dict) for one in rope.values()) else "", ("",)),
            "norm": ("RMSNorm" if hasattr(config, "rms_norm_eps") else "none with rms_norm_eps", ("RMSNorm",))}
    for name, (value, allowed) in kept.items():
        if value not in allowed:
            raise InputError(f"{where}: prefix-mlp on base {vocabulary.identity.name}: its {name} ({value}) makes another layer "
                             "than the prefix layer here")
    return float(rope.get("rope_theta") or THETA)


def _check_fit(found: OfficialTensors, name: str, vocabulary: BaseVocabulary) -> None:
    """Raise InputError where the matrix `name` shows that the heads belong to a base of another width or vocabulary."""
    shape = found.shape(name)
    rows = name.endswith("linear.weight")
    wanted = (vocabulary.width if rows else vocabulary.size, vocabulary.width)
    if shape is not None and len(shape) == 2 and shape != wanted:
        raise InputError(f"{found.path}: heads of another base: {name} has shape {shape}, and base {vocabulary.identity.name} "
                         f"(base.model) wants {wanted}: {'width and width' if rows else 'tokens and width'}")


def _compare_embedding(found: OfficialTensors, described: Described, vocabulary: BaseVocabulary) -> tuple[str, ...]:
    """Hydra's files carry a copy of the base's token embeddings, which shows the base: raise InputError for another one."""
    copy = found.take_optional("input_embed_fn.weight", *vocabulary.embedding.shape)
    if copy is None:
        return _base_is_not_shown(described)
    for theirs, ours in zip(torch.split(copy, 4096), torch.split(vocabulary.embedding, 4096), strict=True):
        if not torch.allclose(theirs.float(), ours.float().cpu(), rtol=CLOSE, atol=TINY):
            raise InputError(f"{found.path}: tensor input_embed_fn.weight: the embeddings of these heads' base are not "
                             f"those of base {vocabulary.identity.name}: config.json names {_made_for(described)}")
    return ()


def _base_is_not_shown(described: Described) -> tuple[str, ...]:
    return (f"nothing in the file shows which base these heads belong to: config.json names {_made_for(described)}",)


def _made_for(described: Described) -> str:
    return " ".join(str(described.values.get("base_model_name_or_path", "none")).split())
