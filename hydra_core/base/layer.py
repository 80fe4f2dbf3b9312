"""One decoder layer's weights, as every forward of ours takes them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hydra_core.base.attention import HeadNorms
from hydra_core.base.linear import FrozenLinear


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; norms are [D]."""

    input_norm: Tensor
    qkv: FrozenLinear
    head_norms: HeadNorms | None
    output: FrozenLinear
    mlp_norm: Tensor
    gate_up: FrozenLinear
    down: FrozenLinear
