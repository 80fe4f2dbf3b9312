"""The weights of one decoder layer, as both the PyTorch forward and the C++ decoder take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hydra_core.base.attention import HeadNorms
from hydra_core.base.linear import FrozenLinear


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer with hidden width D; the weights of its norms are [D]."""

    input_norm: Tensor
    qkv: FrozenLinear
    head_norms: HeadNorms | None
    output: FrozenLinear
    mlp_norm: Tensor
    gate_up: FrozenLinear
    down: FrozenLinear
