"""Heads in the layouts in which Hydra and Medusa are published, with random weights, and what they compute, written from the
description of those layouts: transformers' own Llama layer, matrices by hand, none of this project's heads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaModel

from hydra_core.base import Base
from hydra_core.heads import HeadDrafter

Tensors = dict[str, Tensor]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.3


def block(name: str, width: int, wide: int | None = None) -> Tensors:
    """A residual block that reads `wide` numbers; one that is wider than `width` projects them."""
    made = {f"{name}.linear.weight": random(width, wide or width), f"{name}.linear.bias": random(width)}
    if wide:
        made |= {f"{name}.res_connection.weight": random(width, wide), f"{name}.res_connection.bias": random(width)}
    return made


def hydra_tensors(base: Base, heads: int = 3, layers: int = 2, prefix: bool = False, grounded: bool = True) -> Tensors:
    """As the published code makes them: the later blocks of a head are one block under several names."""
    width, size = base.vocabulary.width, base.vocabulary.size
    tensors = {"input_embed_fn.weight": base.vocabulary.embedding.clone()}
    if prefix:
        tensors |= {f"prefix_embeding_layer.{name}": value for name, value in prefix_layer(base).state_dict().items()}
    for i in range(heads):
        places = [2 * j + 1 for j in range(layers)] if prefix else list(range(layers))
        shared = block("", width)
        for j, place in enumerate(places):
            if j or not grounded:
                tensors |= {f"hydra_mlp.{i}.{place}{name}": value for name, value in shared.items()}
            else:
                tensors |= block(f"hydra_mlp.{i}.{place}", width, (i + 2) * width)
        last = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
        tensors |= {f"{last}.weight": random(size, width), f"{last}.bias": random(size)}
    return tensors


def prefix_layer(base: Base) -> LlamaModel:
    """One layer of the base's configuration, with its embedding table and final norm."""
    config = copy.deepcopy(base.vocabulary.config)
    config.num_hidden_layers = 1
    config._attn_implementation = "eager"
    layer = LlamaModel(config).eval()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(random(*parameter.shape) + (1.0 if "norm" in name else 0.0))
    return layer


def medusa_tensors(base: Base, heads: int = 3, layers: int = 1, own: bool = True) -> Tensors:
    width, tensors = base.vocabulary.width, {}
    for i in range(heads):
        for j in range(layers):
            tensors |= block(f"{i}.{j}", width)
        if own:
            tensors[f"{i}.{layers}.weight"] = random(base.vocabulary.size, width)
    return tensors


def hydra_config(heads: int = 3, layers: int = 2, prefix: bool = False, grounded: bool = True) -> dict[str, Any]:
    return {"hydra_num_heads": heads, "hydra_num_layers": layers, "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
            "grounded_heads": grounded, "hidden_state_offset": 0, "base_model_name_or_path": "a/base"}


def medusa_config(heads: int = 3, layers: int = 1) -> dict[str, Any]:
    return {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": "a/base"}


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str = "hydra_lm_head.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: value.clone() for key, value in tensors.items()}, folder / name)
    else:
        torch.save(dict(tensors), folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def run_block(tensors: Tensors, name: str, x: Tensor) -> Tensor:
    carried = x
    if f"{name}.res_connection.weight" in tensors:
        carried = x @ tensors[f"{name}.res_connection.weight"].T + tensors[f"{name}.res_connection.bias"]
    return carried + F.silu(x @ tensors[f"{name}.linear.weight"].T + tensors[f"{name}.linear.bias"])


@torch.no_grad()
def hydra_logits(base: Base, tensors: Tensors, config: Mapping[str, Any], hidden: Tensor, ids: Tensor) -> list[Tensor]:
    """Logits [T - 1 - i, V] of head i at positions t = 0 .. T - 2 - i: from h_t, or the layer's output there, and the embeddings
    of x_{t+1} .. x_{t+1+i}. `hidden`: [T, D]; `ids`: [T]."""
    prefix = config["hydra_head_arch"] == "prefix-mlp"
    read = hidden
    if prefix:
        layer = prefix_layer(base)
        start = "prefix_embeding_layer."
        layer.load_state_dict({name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)})
        read = layer(inputs_embeds=hidden[None]).last_hidden_state[0]
    embedded = base.vocabulary.embedding[ids]
    made = []
    for i in range(config["hydra_num_heads"]):
        count = len(ids) - 1 - i
        parts = [read[:count]]
        if config["grounded_heads"]:
            parts += [embedded[1 + k:1 + k + count] for k in range(i + 1)]
        x = torch.cat(parts, dim=-1)
        for j in range(config["hydra_num_layers"]):
            x = run_block(tensors, f"hydra_mlp.{i}.{2 * j + 1 if prefix else j}", x)
        last = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
        made.append(x @ tensors[f"{last}.weight"].T + tensors[f"{last}.bias"])
    return made


@torch.no_grad()
def medusa_logits(base: Base, tensors: Tensors, config: Mapping[str, Any], hidden: Tensor, ids: Tensor) -> list[Tensor]:
    """The same of Medusa's heads, which read h_t alone."""
    made, layers = [], config["medusa_num_layers"]
    for i in range(config["medusa_num_heads"]):
        x = hidden[:len(ids) - 1 - i]
        for j in range(layers):
            x = run_block(tensors, f"{i}.{j}", x)
        made.append(x @ tensors.get(f"{i}.{layers}.weight", base.vocabulary.head.weight).T)
    return made


@torch.no_grad()
def our_logits(heads: HeadDrafter, hidden: Tensor, ids: Tensor) -> list[Tensor]:
    """What this project's heads make of the same."""
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()[None, None]
    features, embedded = heads.features(hidden[None], torch.arange(len(ids))[None], mask)[0], heads.embed(ids)
    made = []
    for i in range(heads.num_heads):
        count = len(ids) - 1 - i
        path = torch.stack([embedded[1 + k:1 + k + count] for k in range(i + 1)], dim=1)
        made.append(heads.head_logits(i, heads.head_hidden(i, features[:count], path)))
    return made


def published(base: Base, heads: HeadDrafter) -> Tensors:
    """Hydra heads of this project that have all that published ones have, by the published names."""
    values, prefix = heads.state_dict(), heads.config.prefix_layer
    tensors = {"input_embed_fn.weight": base.vocabulary.embedding.clone()}
    for i in range(heads.num_heads):
        for j in range(heads.config.num_blocks):
            place = f"hydra_mlp.{i}.{2 * j + 1 if prefix else j}"
            for ours, theirs in (("inner", "linear"), ("skip", "res_connection")):
                start = f"heads.{i}.blocks.{j}.{ours}."
                tensors |= {f"{place}.{theirs}.{name.removeprefix(start)}": value for name, value in values.items()
                            if name.startswith(start)}
        last = f"hydra_lm_head.{i}.1" if prefix else f"hydra_lm_head.{i}"
        tensors |= {f"{last}.{part}": values[f"own_rows.{i}.{part}"] for part in ("weight", "bias")}
    if prefix:
        layer, width = "prefix_embeding_layer.layers.0", base.vocabulary.width
        keys = (len(values["prefix.qkv.weight"]) - width) // 2
        names = zip("qkv", values["prefix.qkv.weight"].split([width, keys, keys]), strict=True)
        tensors |= {f"{layer}.self_attn.{name}_proj.weight": value for name, value in names}
        names = zip(("gate", "up"), values["prefix.gate_up.weight"].chunk(2), strict=True)
        tensors |= {f"{layer}.mlp.{name}_proj.weight": value for name, value in names}
        tensors |= {f"{layer}.self_attn.o_proj.weight": values["prefix.output.weight"],
                    f"{layer}.mlp.down_proj.weight": values["prefix.down.weight"],
                    f"{layer}.input_layernorm.weight": values["prefix.input_norm.weight"],
                    f"{layer}.post_attention_layernorm.weight": values["prefix.mlp_norm.weight"],
                    "prefix_embeding_layer.norm.weight": values["prefix.norm.weight"],
                    "prefix_embeding_layer.embed_tokens.weight": random(*base.vocabulary.embedding.shape)}
    return {name: value.clone() for name, value in tensors.items()}
