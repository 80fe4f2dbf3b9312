"""The two ends of the base model: token embeddings in, vocabulary projection out. All that training needs of it."""

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
    """Which base, in which weight format: heads trained on another one are refused.

    `digest`: sha256 of the configuration and weights, as hex; `weight_format`: bf16, fp32, int4 or
    int4-lossy.
    """

    name: str
    digest: str
    weight_format: str

    def __str__(self) -> str:
        return f"{self.name}@{self.digest[:16]}:{self.weight_format}"


def argmax(logits: Tensor) -> Tensor:
    """[...] int64: the likeliest token of each [..., V], the first of equals, as `argmax` has it.

    On a CPU by NumPy's, which takes a fifth of the time of torch's.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.as_tensor(logits.numpy().argmax(-1))


@dataclass(frozen=True)
class VocabHead:
    """Hidden state to logits: the one function for matrix, bias, scale and soft cap.

    `weight`: [V, D]; `bias`: [V] or None; `scale` multiplies the logits (Granite, Cohere); `softcap` bounds them (Gemma);
    `packed`: a copy of matrix and bias in the layout that decodes fastest, see `for_decoding`.
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

    def argmax(self, hidden: Tensor) -> Tensor:
        """[..., D] to the likeliest token [...] int64, as `argmax` of the logits has it."""
        packed = self.packed
        plain = self.softcap is None and self.scale == 1.0
        if packed is None or packed.layout != "blocked" or packed.few is not None or not plain:
            return argmax(self(hidden))
        flat = hidden.to(self.weight.dtype).reshape(-1, hidden.shape[-1])
        return ops.linear_argmax(flat, packed.weight, packed.bias).view(hidden.shape[:-1])

    def for_decoding(self) -> VocabHead:
        """The same head with a packed copy of its matrix, where this machine has a faster layout."""
        return replace(self, packed=FrozenLinear.of(self.weight, self.bias)) if packable(self.weight) else self

    def for_drafting(self) -> VocabHead:
        """The same, in 4 bits for few rows: close to the head's logits, and read three times as fast."""
        return replace(self, packed=FrozenLinear.for_drafts(self.weight, self.bias)) if packable(self.weight) else self

    def restrict(self, ids: Tensor) -> VocabHead:
        """The head over the tokens `ids` [Vd] alone, in that order."""
        bias = None if self.bias is None else self.bias[ids].contiguous()
        return VocabHead(self.weight[ids].contiguous(), bias, self.scale, self.softcap)

    @classmethod
    def of(cls, config: Any, weight: Tensor, bias: Tensor | None) -> VocabHead:
        """Read scale and soft cap off a transformers config."""
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(weight, bias, float(scale), getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class BaseVocabulary:
    """Frozen tensors that heads share with the base.

    `embedding`: [V, D]; `norm_weight`: [D], the base's final norm; `head`: the vocabulary projection; `config`: the
    transformers text configuration.
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
