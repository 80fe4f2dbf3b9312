"""GGUF's Q4_1 matrices with their own codes: read once from the file, kept beside the dequantised copy; or made, lossily.

A row is cut into groups of 32. A group stores a scale d and a minimum m (float16) and sixteen bytes of codes q, the low
halves first: value = q * d + m, q in 0..15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GROUP = 32
FILE = "q4_1/codes.safetensors"
PARTS = ("codes", "scale", "minimum")
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
"""llama.cpp's name of a layer's matrix -> transformers'."""


@dataclass(frozen=True)
class Q4Matrix:
    """`codes`: [out, in] uint8 below 16; `scale`, `minimum`: [out, in / 32] float16."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in] values, computed in `dtype`; in float32 those of llama.cpp, to the last bit."""
        groups = self.codes.unflatten(1, (-1, GROUP)).to(dtype)
        return (groups * self.scale[..., None].to(dtype) + self.minimum[..., None].to(dtype)).flatten(1)

    def rows(self, order: Tensor) -> Q4Matrix:
        """The rows `order` [n] int64."""
        return Q4Matrix(self.codes[order], self.scale[order], self.minimum[order])

    @classmethod
    def joined(cls, parts: list[Q4Matrix]) -> Q4Matrix:
        """Several matrices one below the other."""
        return cls(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]),
                   torch.cat([part.minimum for part in parts]))


def unpack_blocks(data: np.ndarray) -> Q4Matrix:
    """Q4_1 blocks [out, 20 * in / 32] uint8, as a GGUF file holds them."""
    blocks = torch.from_numpy(np.array(data)).unflatten(1, (-1, 20))  # a copy: the file is mapped read-only
    halves = blocks[..., :4].contiguous().view(torch.float16)
    nibbles = blocks[..., 4:]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    return Q4Matrix(codes.flatten(1), halves[..., 0].contiguous(), halves[..., 1].contiguous())


def quantise(weight: Tensor) -> Q4Matrix:
    """The nearest codes to [out, in] values in float32, `in` a multiple of 32, between each group's least and greatest:
    every value comes back within half a scale. What was Q4_1 already, with codes 0 and 15 in use, comes back as it was.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    nearest = low.half()
    # a minimum rounded upwards could lie further above the least value than half a scale
    minimum = torch.where(nearest.float() > low, torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)), nearest)
    scale = ((high - minimum.float()) / 15).half()
    steps = torch.where(scale == 0, 1, scale).float()  # all of a group the same
    codes = ((groups - minimum.float()[..., None]) / steps[..., None]).round().clamp(0, 15)
    return Q4Matrix(codes.to(torch.uint8).flatten(1), scale, minimum)


def save_codes(gguf: Path, model: Any, folder: Path) -> bool:
    """Write the codes of every layer's matrices to `folder`, under the names and in the row order of `model`, the
    transformers model that was dequantised from the file.

    False, and nothing written, unless all of them are Q4_1 and dequantise to the model's very values.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    weights = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for tensor in GGUFReader(gguf).tensors:
        block, _, rest = str(tensor.name).partition(".")
        number, _, part = rest.partition(".")
        name = f"model.layers.{number}.{NAMES.get(part.removesuffix('.weight'))}.weight"
        if block != "blk" or name not in weights:
            continue
        if tensor.tensor_type != GGMLQuantizationType.Q4_1:
            return False
        matrix = _in_order_of(weights[name], unpack_blocks(tensor.data), model.config)
        if matrix is None:
            return False
        tensors |= {f"{name}.{kind}": getattr(matrix, kind).contiguous() for kind in PARTS}
    if len(tensors) != len(PARTS) * len(NAMES) * model.config.num_hidden_layers:
        return False
    (folder / FILE).parent.mkdir()
    save_file(tensors, folder / FILE)
    return True


def _in_order_of(weight: Tensor, matrix: Q4Matrix, config: Any) -> Q4Matrix | None:
    """`matrix` with its rows as in `weight` [out, in] float32: as they are, or, where llama.cpp turns neighbouring pairs
    and transformers turns halves, brought back. None if neither fits."""
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for candidate in (matrix, matrix.rows(torch.arange(len(weight)).view(-1, head_width // 2, 2).transpose(1, 2).flatten())
                      if len(weight) % head_width == 0 else matrix):
        if torch.equal(candidate.dequantise(), weight):
            return candidate
    return None


def load_codes(folder: Path) -> Mapping[str, Q4Matrix] | None:
    """transformers' tensor name -> codes, or None where the checkpoint is not quantised so."""
    path = folder / FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as handle:
        names = sorted({name.rpartition(".")[0] for name in handle.keys()})  # noqa: SIM118
        return {name: Q4Matrix(*(handle.get_tensor(f"{name}.{kind}") for kind in PARTS)) for name in names}
