"""Matrices in GGUF's Q4_1 format: read from a file and kept beside the dequantised copy, or quantised from other weights.

A row is divided into groups of 32. A group stores a scale d and a minimum m (float16) and sixteen bytes of codes q, the low
halves first: value = q * d + m with q in 0..15.
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

from hydra_core.kernels.ops import INT4_GROUP

FILE = "q4_1/codes.safetensors"
PARTS = ("codes", "scale", "minimum")
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
"""llama.cpp's name of a layer's matrix -> transformers'."""


@dataclass(frozen=True)
class Q4Matrix:
    """A matrix [out, in]. `codes`: [out, in] uint8 below 16; `scale`, `minimum`: [out, in / 32] float16."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [out, in], computed in `dtype`; in float32 they equal llama.cpp's to the last bit."""
        groups = self.codes.reshape(len(self.codes), -1, INT4_GROUP).to(dtype)
        return (groups * self.scale[..., None].to(dtype) + self.minimum[..., None].to(dtype)).flatten(1)

    def rows(self, order: Tensor) -> Q4Matrix:
        """The matrix of the rows `order` [n] int64."""
        return Q4Matrix(self.codes[order], self.scale[order], self.minimum[order])

    @classmethod
    def joined(cls, parts: list[Q4Matrix]) -> Q4Matrix:
        """The rows of several matrices, one matrix after another."""
        return cls(torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts]),
                   torch.cat([part.minimum for part in parts]))


def unpack_blocks(data: np.ndarray) -> Q4Matrix:
    """The matrix of Q4_1 blocks [out, 20 * in / 32] uint8, as a GGUF file stores them."""
    blocks = torch.from_numpy(np.array(data)).reshape(len(data), -1, 20)  # a copy: the file is mapped read-only
    halves = blocks[..., :4].contiguous().view(torch.float16)
    nibbles = blocks[..., 4:]
    codes = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    return Q4Matrix(codes.flatten(1), halves[..., 0].contiguous(), halves[..., 1].contiguous())


def quantise(weight: Tensor) -> Q4Matrix:
    """The nearest codes to `weight` [out, in], `in` a multiple of 32, between the least and the greatest value of each group.

    Dequantised values differ by at most half a scale. The values of a Q4_1 matrix whose groups use codes 0 and 15 are
    reproduced exactly.
    """
    groups = weight.float().reshape(len(weight), -1, INT4_GROUP)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    nearest = low.half()
    # a minimum that is rounded up could be more than half a scale above the least value
    minimum = torch.where(nearest.float() > low, torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)), nearest)
    scale = ((high - minimum.float()) / 15).half()
    steps = torch.where(scale == 0, 1, scale).float()  # a scale of 0: all values of the group are equal
    codes = ((groups - minimum.float()[..., None]) / steps[..., None]).round().clamp(0, 15)
    return Q4Matrix(codes.to(torch.uint8).flatten(1), scale, minimum)


def save_codes(gguf: Path, model: Any, folder: Path) -> bool:
    """Write the codes of all layers' matrices to `folder`, with the names and the row order of `model`, the transformers model
    that was dequantised from the file `gguf`.

    Returns False and writes nothing unless all of them are Q4_1 and dequantise exactly to the model's values.
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
    """`matrix` with its rows in the order of `weight` [out, in] float32, or None if no known order fits.

    Rotary positions rotate neighbouring pairs in llama.cpp and halves in transformers, so the rows of query and key matrices
    are permuted in a GGUF file.
    """
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for candidate in (matrix, matrix.rows(torch.arange(len(weight)).view(-1, head_width // 2, 2).transpose(1, 2).flatten())
                      if len(weight) % head_width == 0 else matrix):
        if torch.equal(candidate.dequantise(), weight):
            return candidate
    return None


def load_codes(folder: Path) -> Mapping[str, Q4Matrix] | None:
    """transformers' tensor name -> codes, or None if the checkpoint in `folder` has none."""
    path = folder / FILE
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as handle:
        names = sorted({name.rpartition(".")[0] for name in handle.keys()})  # noqa: SIM118
        return {name: Q4Matrix(*(handle.get_tensor(f"{name}.{kind}") for kind in PARTS)) for name in names}
