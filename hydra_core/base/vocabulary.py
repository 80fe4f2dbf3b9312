"""The two ends of the base model, token embeddings and vocabulary projection: all that training needs of the base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hydra_core.base.linear import FrozenLinear, packable
from hydra_core.kernels import ops


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model in which weight format. Heads that were trained on another one are rejected.

    `digest`: sha256 of the configuration and weights, as hex; `weight_format`: bf16, fp32, int4 or
    int4-lossy.
    """

    name: str
    digest: str
    weight_format: str

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:16]}:{self.weight_format}"


def argmax(logits: Tensor) -> Tensor:
    """Index of the largest of the V logits [..., V], the first among equals: [...] int64.

    On a CPU this is NumPy's argmax, which takes a fifth of the time of torch's.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.as_tensor(logits.numpy().argmax(-1))


ROWS = 8192
"""Rows of the vocabulary projection that are widened to float64 at a time: 256 MB at a width of 4096."""


@dataclass(frozen=True)
class VocabHead:
    """The vocabulary projection, from hidden states to logits: matrix, bias, scale and soft cap.

    `weight`: [V, D]; `bias`: [V] or None; `scale` multiplies the logits (Granite, Cohere); `softcap` bounds them
    (Gemma); `packed`: matrix and bias in the layout that is fastest for decoding, or None; see `for_decoding`.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    packed: FrozenLinear | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., D] of any float dtype to logits [..., V] in float32."""
        hidden = hidden.to(self.weight.dtype)
        if self.packed is not None and not hidden.requires_grad:
            logits = self.packed(hidden).float()
        else:
            logits = F.linear(hidden, self.weight, self.bias).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def in_float64(self, hidden: Tensor) -> Tensor:
        """[D] of any float dtype to logits [V] float64: products of the weights' own values, summed in float64. `ROWS` rows of
        the matrix are widened at a time."""
        wide = hidden.double()
        logits = torch.cat([self.weight[first:first + ROWS].double() @ wide for first in range(0, self.weight.shape[0], ROWS)])
        if self.bias is not None:
            logits = logits + self.bias.double()
        logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def argmax(self, hidden: Tensor) -> Tensor:
        """The argmax [...] int64 of the logits of `hidden` [..., D], the first among equals."""
        packed = self.packed
        plain = self.softcap is None and self.scale == 1.0
        if packed is None or packed.layout != "blocked" or packed.few is not None or not plain:
            return argmax(self(hidden))
        flat = hidden.to(self.weight.dtype).reshape(-1, hidden.shape[-1])
        return ops.linear_argmax(flat, packed.weight, packed.bias).view(hidden.shape[:-1])

    def for_decoding(self) -> VocabHead:
        """This head with a packed copy of its matrix, where this machine has a faster layout."""
        return replace(self, packed=FrozenLinear.of(self.weight, self.bias)) if packable(self.weight) else self

    def for_drafting(self) -> VocabHead:
        """This head with a packed copy in 4 bits for few rows: its logits are close, and it is read three times as fast."""
        return replace(self, packed=FrozenLinear.for_drafts(self.weight, self.bias)) if packable(self.weight) else self

    def restrict(self, ids: Tensor) -> VocabHead:
        """The head over only the tokens `ids` [Vd], in that order."""
        bias = None if self.bias is None else self.bias[ids].contiguous()
        return VocabHead(self.weight[ids].contiguous(), bias, self.scale, self.softcap)


@dataclass(frozen=True)
class BaseVocabulary:
    """Frozen tensors of the base that draft heads use too.

    `embedding`: [V, D]; `norm_weight`: [D], what the base's final norm multiplies by; `head`: the vocabulary projection;
    `config`: the transformers text configuration.
    """

    identity: BaseIdentity
    config: Any
    stop_ids: tuple[int, ...]
    embedding: Tensor
    norm_weight: Tensor
    norm_eps: float
    head: VocabHead

    @property
    def width(self) -> int:
        return self.embedding.shape[1]

    @property
    def size(self) -> int:
        return self.head.weight.shape[0]
