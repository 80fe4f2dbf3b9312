"""EAGLE: one decoder layer that drafts token after token, from its own output (EAGLE-1, arXiv 2401.15077; EAGLE-3, 2503.01840).

    position          t                  t+1                t+2
    reads             f_t, e(x_{t+1})    s_t, e(x_{t+2})    s_{t+1}, e(x_{t+3})
    state             s_t                s_{t+1}            s_{t+2}
    predicts          x_{t+2}            x_{t+3}            x_{t+4}

f_t: taps of the base at t (EAGLE-3) or its last hidden state (EAGLE-1), through one matrix. Up to the last committed token f is
known; behind it the layer's own state takes its place. Step i of a draft is what head i is for the other kinds: it reads the
tokens up to x_{t+1+i} and predicts x_{t+2+i}.

The tensors are those of the folders that vLLM, SGLang and llama.cpp read, with q, k and v (and gate and up) side by side; the
vocabulary rows are the base's own, restricted to the draft vocabulary. `norm_before_residual` is false: the residual is the state
itself, and the state that is fed back is the one before the last norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra_core.base.attention import cached_attention, grouped_mask, rotate
from hydra_core.base.kv_cache import AttentionMetadata, KVCache
from hydra_core.base.linear import PackableLinear, draft_bytes, packable
from hydra_core.base.taps import check_taps
from hydra_core.base.vocabulary import BaseVocabulary
from hydra_core.heads.base import HeadDrafter
from hydra_core.heads.config import HeadsConfig
from hydra_core.heads.draft_vocab import DraftVocab
from hydra_core.heads.prefix import PrefixLayer


class EagleLayer(PrefixLayer):
    """A Llama decoder layer whose queries, keys and values read a token's embedding beside the state, with norms of their own.

    `features`: width of what is read of the base, over the base's width. With 1 the layer starts as the identity on it.
    """

    def __init__(self, config: Any, features: int) -> None:
        super().__init__(config)
        width, eps = config.hidden_size, self.eps
        self.fc = PackableLinear(features * width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, eps=eps)
        self.qkv = PackableLinear(2 * width, (self.query_heads + 2 * self.kv_heads) * self.head_width, bias=False)
        if features == 1:
            nn.init.eye_(self.fc.weight)

    def pack(self) -> None:
        """Pack the weights for decoding, where this machine has a faster layout."""
        for matrix in (self.fc, self.qkv, self.output, self.gate_up, self.down):
            if packable(matrix.weight):
                matrix.pack()

    def project(self, states: Tensor, embedded: Tensor) -> Tensor:
        """Queries, keys and values [B, N, heads, d], not rotated, of states and token embeddings [B, N, D]."""
        qkv: Tensor = self.qkv(torch.cat((self.input_norm(embedded), self.hidden_norm(states)), dim=-1))
        return qkv

    def extend(self, states: Tensor, embedded: Tensor, cache: KVCache, step: AttentionMetadata) -> Tensor:
        """While decoding: the next states [B, N, D], before the last norm, of states and embeddings [B, N, D]; writes keys and
        values to the cache."""
        qkv = self.project(states, embedded)
        cos, sin = self._rotary_like(qkv).at(step.positions, step.kv_len)
        mask = grouped_mask(step.mask, self.query_heads // self.kv_heads)
        return self._added(states, cached_attention(qkv, self.query_heads, cache, 0, step, cos, sin, mask))

    def unroll(self, states: Tensor, embedded: Tensor, positions: Tensor, mask: Tensor, steps: int) -> list[Tensor]:
        """The states of `steps` steps from every position, teacher-forced: [B, T, D] each, before the last norm.

        `states`: [B, T, D] of the base, through `fc`; `embedded`: [B, T, D] of x_t; `positions`: [B, T]; `mask`: [B, 1, T, T].
        Step i from t attends to the keys of the base's states up to t, and to those of its own steps from t: the mask of
        EAGLE-3's training-time test. So what it reads is what it reads while decoding along the true tokens.
        """
        found: list[Tensor] = []
        known: tuple[Tensor, Tensor] | None = None
        own: list[tuple[Tensor, Tensor]] = []
        for step in range(steps):
            qkv = self.project(states, embedded.roll(-1 - step, dims=1))
            batch, tokens, _ = qkv.shape
            split = qkv.view(batch, tokens, self.query_heads + 2 * self.kv_heads, self.head_width)
            cos, sin = self._rotary_like(qkv).at(positions + step)
            rotated = rotate(split[:, :, :self.query_heads + self.kv_heads], cos, sin)
            queries, keys = rotated[:, :, :self.query_heads], rotated[:, :, self.query_heads:]
            values = split[:, :, self.query_heads + self.kv_heads:]
            if known is None:
                known = keys, values
            else:
                own.append((keys, values))
            states = self._added(states, _unrolled_attention(queries, known, own, mask))
            found.append(states)
        return found


def _unrolled_attention(queries: Tensor, known: tuple[Tensor, Tensor], own: Sequence[tuple[Tensor, Tensor]],
                        mask: Tensor) -> Tensor:
    """Attention of queries [B, T, Hq, d] to the `known` keys and values [B, T, H, d] that `mask` [B, 1, T, T] lets them see, and
    to those of their `own` position: [B, T, Hq * d]."""
    batch, tokens, heads, width = queries.shape
    keys, values = known
    grouped = queries.view(batch, tokens, keys.shape[2], -1, width) * width ** -0.5
    scores = torch.einsum("bthgd,bshd->bhgts", grouped, keys).masked_fill(~mask[:, :, None], float("-inf"))
    more = [torch.einsum("bthgd,bthd->bhgt", grouped, key)[..., None] for key, _ in own]
    weights = torch.cat((scores, *more), dim=-1).float().softmax(-1).to(queries.dtype)
    mixed = torch.einsum("bhgts,bshd->bthgd", weights[..., :tokens], values)
    for place, (_, value) in enumerate(own):
        mixed = mixed + weights[..., tokens + place].permute(0, 3, 1, 2)[..., None] * value[:, :, :, None]
    return mixed.reshape(batch, tokens, heads * width)


def eagle_taps(config: HeadsConfig, layers: int) -> tuple[int, ...]:
    """The layers of a base of `layers` layers whose inputs heads of `config` read: by default low, middle and high (2, half, last
    but two), as EAGLE-3 has them; none for the other kinds. Raises InputError for layers that the base does not have."""
    if not config.reads_taps:
        return ()
    taps = config.taps or (min(2, layers - 1), layers // 2, max(layers - 3, 0))
    check_taps(taps, layers)
    return taps


class Eagle(HeadDrafter):
    """The layer over taps (`kind: eagle3`) or over the last hidden state (`kind: eagle`); `num_heads` steps are trained."""

    def __init__(self, config: HeadsConfig, vocabulary: BaseVocabulary, draft_vocab: DraftVocab) -> None:
        self.taps = eagle_taps(config, vocabulary.config.num_hidden_layers)
        super().__init__(config.model_copy(update={"taps": self.taps or None}), vocabulary, draft_vocab)
        self.layer = EagleLayer(vocabulary.config, max(1, len(self.taps)))

    @property
    def weight(self) -> Tensor:
        return self.layer.fc.weight

    def bytes_read(self, depth: int) -> int:
        matrices = [weight for name, weight in self.layer.named_parameters() if weight.ndim == 2 and name != "fc.weight"]
        return depth * (sum(map(draft_bytes, matrices)) + draft_bytes(self.rows.weight)) + draft_bytes(self.layer.fc.weight)

    def pack(self) -> None:
        self._packed = self.rows.for_drafting()
        self.layer.pack()

    def embed(self, tokens: Tensor) -> Tensor:
        """Base embeddings [..., D] of `tokens` [...] int64, as they are: the layer has a norm for them."""
        return F.embedding(tokens, self.vocabulary.embedding).to(self.weight.dtype)

    def read(self, hidden: Tensor) -> Tensor:
        """What the layer reads [..., D] of the base's hidden states with the taps behind them [..., (1 + T) * D]."""
        wide = hidden[..., self.vocabulary.width:] if self.taps else hidden[..., :self.vocabulary.width]
        states: Tensor = self.layer.fc(wide.to(self.weight.dtype))
        return states

    def logits_of(self, states: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., Vd] float32 of the layer's states [..., D]."""
        return self.draft_logits(self.layer.norm(states))

    def outputs(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor) -> EagleOutputs:
        states = self.layer.unroll(self.read(hidden), self.embed(token_ids), positions, mask, self.num_heads)
        return EagleOutputs([self.layer.norm(state).flatten(0, 1) for state in states])


class EagleOutputs:
    """The outputs of all steps from all positions of a batch."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = states

    def __call__(self, head: int, features: Tensor, path: Tensor) -> Tensor:
        """As `HeadOutputs`."""
        return self.states[head][features]
