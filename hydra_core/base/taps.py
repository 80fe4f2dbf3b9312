"""Taps: hidden states from inside the base, which some drafters read beside those at its end.

Tap i is what enters layer i, the residual stream after layer i - 1: entry i of transformers' `hidden_states`, as EAGLE-3
(arXiv 2503.01840) and vLLM's `eagle_aux_hidden_state_layer_ids` count. Tap 0 is the token embedding. A forward with T taps gives
[B, N, (1 + T) * D]: the hidden states after the final norm first, then the taps in the order asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hydra_core.errors import InputError


def with_taps(hidden: Tensor, tapped: Sequence[Tensor]) -> Tensor:
    """`hidden` [B, N, D] with the taps [B, N, D] each of any float dtype behind it: [B, N, (1 + T) * D] in its dtype."""
    return torch.cat([hidden, *(tap.to(hidden.dtype) for tap in tapped)], dim=-1) if tapped else hidden


def last_of(hidden: Tensor, width: int) -> Tensor:
    """The hidden states at the base's end, [..., width], of a forward with or without taps."""
    return hidden if hidden.shape[-1] == width else hidden[..., :width].contiguous()


def check_taps(taps: Sequence[int], layers: int) -> None:
    """Raise InputError for a tap that a base of `layers` layers does not have."""
    if wrong := [tap for tap in taps if not 0 <= tap < layers]:
        raise InputError(f"taps: layer {wrong[0]} is not among the {layers} layers of this base: taps are counted from 0")
