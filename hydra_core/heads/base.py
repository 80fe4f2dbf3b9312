"""What Medusa, Hydra and Hydra++ share: MLP heads with the base's width as output, followed by rows of the base's vocabulary, or
by rows of their own.

Letters: B rows, T positions, K heads, D width, Vd draft vocabulary. Head i at position t predicts x_{t+2+i}.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydra_core.base.linear import FrozenLinear, Packable, PackableLinear, draft_bytes, packable
from hydra_core.base.native import native_head
from hydra_core.base.taps import last_of
from hydra_core.base.vocabulary import BaseVocabulary, VocabHead
from hydra_core.heads.config import HeadsConfig
from hydra_core.heads.draft_vocab import DraftVocab
from hydra_core.heads.own_rows import OwnRows
from hydra_core.kernels import ops


class ResBlock(nn.Module):
    """x + SiLU(W x + b); where the input is wider than the output, the residual goes through a learned projection.

    W starts at zero, so a square block starts as the identity (Medusa, arXiv 2401.10774).
    """

    def __init__(self, width_in: int, width: int, skip_bias: bool = False) -> None:
        super().__init__()
        self.inner = PackableLinear(width_in, width)
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        self.skip = PackableLinear(width_in, width, bias=skip_bias) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] to [..., width]."""
        residual = x if self.skip is None else self.skip(x)
        return residual + F.silu(self.inner(x))

    def frozen(self) -> list[FrozenLinear]:
        """Its one matrix; the projection of the residual is computed in the same product."""
        return [_side_by_side(self.inner, self.skip)]


class GatedBlock(nn.Module):
    """x + W3 (SiLU(W1 x) * (W2 x)), the MLP of a Llama layer in the head's own width (SwiGLU, arXiv 2002.05202).

    W3 starts at zero, and a wider input is projected, as in `ResBlock`.
    """

    def __init__(self, width_in: int, width: int, skip_bias: bool = False) -> None:
        super().__init__()
        self.gate_up = PackableLinear(width_in, 2 * width, bias=False)
        self.down = PackableLinear(width, width, bias=False)
        nn.init.zeros_(self.down.weight)
        self.skip = PackableLinear(width_in, width, bias=skip_bias) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] to [..., width]."""
        residual = x if self.skip is None else self.skip(x)
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        mixed: Tensor = self.down(F.silu(gate) * up)
        return residual + mixed

    def frozen(self) -> list[FrozenLinear]:
        """Its two matrices; the projection of the residual is computed in the same product as gate and up."""
        return [_side_by_side(self.gate_up, self.skip), self.down.frozen()]


def _side_by_side(layer: PackableLinear, skip: PackableLinear | None) -> FrozenLinear:
    """Two layers of the same input as one; where only one has a bias, the other's is zero."""
    if skip is None:
        return layer.frozen()
    weight = torch.cat((layer.weight, skip.weight)).detach()
    if layer.bias is None and skip.bias is None:
        return FrozenLinear.for_drafts(weight, None)
    biases: list[Tensor] = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in (layer, skip)]
    return FrozenLinear.for_drafts(weight, torch.cat(biases).detach())


class MlpHead(Packable):
    """`num_blocks` blocks that no other head shares, then, with `final_norm`, an RMSNorm that starts as the base's final norm."""

    def __init__(self, width_in: int, vocabulary: BaseVocabulary, config: HeadsConfig) -> None:
        super().__init__()
        width, self.eps = vocabulary.width, vocabulary.norm_eps
        block = GatedBlock if config.mlp == "gated" else ResBlock
        self.blocks = nn.ModuleList(block(width_in if i == 0 else width, width, config.skip_bias)
                                    for i in range(config.num_blocks))
        self.norm = nn.RMSNorm(width, eps=self.eps) if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        if isinstance(self.norm, nn.RMSNorm):
            with torch.no_grad():
                self.norm.weight.copy_(vocabulary.norm_weight)

    @property
    def weight(self) -> Tensor:
        """The last matrix [D, ...] of the last block."""
        block = self.blocks[-1]
        assert isinstance(block, ResBlock | GatedBlock)
        return block.inner.weight if isinstance(block, ResBlock) else block.down.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., width_in] to [..., D], the input of the vocabulary rows."""
        for block in self.blocks:
            x = block(self.dropout(x))
        ended: Tensor = self.norm(x)
        return ended

    def pack(self, rows: VocabHead | None) -> None:
        """Compile the head together with the vocabulary `rows`. Where that is not possible, or without rows, pack its layers one
        by one, if this machine has a packed layout."""
        if rows is not None and packable(self.weight) and rows.packed is not None:
            blocks = [block for block in self.blocks if isinstance(block, ResBlock | GatedBlock)]
            norm = self.norm.weight.detach() if isinstance(self.norm, nn.RMSNorm) else None
            self._packed = native_head([block.frozen() for block in blocks], [block.skip is not None for block in blocks], norm,
                                       self.eps, rows.packed, rows.scale, rows.softcap)
        if self._packed is None:
            for module in self.modules():
                if isinstance(module, PackableLinear):
                    module.pack()

    @property
    def compiled(self) -> Any | None:
        """The object that `native_head` makes, or None, also while gradients are enabled."""
        return None if torch.is_grad_enabled() else self._packed


class HeadOutputs(Protocol):
    """The outputs of heads on a batch."""

    def __call__(self, head: int, features: Tensor, path: Tensor) -> Tensor:
        """[n, D] of head `head` at flat positions `features` [n], given the tokens at `path` [n, head + 1], flat indices too."""
        ...


class HeadDrafter(Packable):
    """A set of draft heads over a frozen base.

    Only trained tensors are parameters; embedding and vocabulary rows belong to the base and are not saved, but for rows that
    the heads have of their own (`config.own_rows`), which are there for the whole vocabulary. Subclasses define
    what a head reads (`head_width`, `head_hidden`) and what replaces the hidden state (`features`), or all of that at once
    (`outputs`). `taps`: layers of the base whose inputs are read too.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, config: HeadsConfig, vocabulary: BaseVocabulary, draft_vocab: DraftVocab) -> None:
        super().__init__()
        self.config, self.draft_vocab = config, draft_vocab
        self.vocabulary = vocabulary
        self.norm_eps = vocabulary.norm_eps
        self.rows = vocabulary.head.restrict(draft_vocab.ids.to(vocabulary.head.weight.device))
        made = 0 if config.autoregressive else 1 if config.recurrent else config.num_heads
        self.heads = nn.ModuleList(MlpHead(self.head_width(i), vocabulary, config) for i in range(made))
        self.own_rows = nn.ModuleList(OwnRows(vocabulary.head) for _ in range(made) if config.own_rows)

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @property
    def weight(self) -> Tensor:
        """A trained tensor [D, ...]; all heads have its dtype and device."""
        return self._head(0).weight

    def _head(self, i: int) -> MlpHead:
        head = self.heads[0 if self.config.recurrent else i]
        assert isinstance(head, MlpHead)
        return head

    def _own(self, i: int) -> OwnRows | None:
        """The vocabulary rows of head `i`, or None where it ends in the base's."""
        rows = self.own_rows[i] if self.config.own_rows else None
        assert rows is None or isinstance(rows, OwnRows)
        return rows

    def bytes_read(self, depth: int) -> int:
        """Bytes that drafting with the first `depth` heads reads: their matrices, and the vocabulary rows once per head."""
        made = min(depth, len(self.heads))
        matrices = [weight for i in range(made) for weight in self._head(i).parameters() if weight.ndim == 2]
        return sum(map(draft_bytes, matrices)) + depth * draft_bytes(self.rows.weight)

    def pack(self) -> None:
        """Pack the weights for decoding where this machine has a faster layout; further training undoes it."""
        self._packed = None if self.config.own_rows else self.rows.for_drafting()
        for i in range(len(self.heads)):
            own = self._own(i)
            rows = self._packed if own is None else own.pack(self.draft_vocab)
            self._head(i).pack(None if self.config.recurrent else rows)

    def with_draft_vocab(self, draft_vocab: DraftVocab) -> HeadDrafter:
        """The same heads with another draft vocabulary: their output has the base's width, so any of its vocabulary rows can
        follow. The two share their trained tensors and the base's, and nothing else; neither sees what the other packs."""
        shared: list[Any] = [*self.parameters(), *self.buffers(), self.vocabulary, self.rows, self.draft_vocab]
        shared += [module._packed for module in self.modules() if isinstance(module, Packable)]
        other = copy.deepcopy(self, {id(value): value for value in shared})
        other.draft_vocab, other.config = draft_vocab, self.config.model_copy(update={"draft_vocab_size": len(draft_vocab)})
        other.rows = self.vocabulary.head.restrict(draft_vocab.ids.to(self.vocabulary.head.weight.device))
        other.train(self.training)  # drops the packed copies
        return other

    def head_width(self, i: int) -> int:
        """Width of what head `i` reads."""
        return self.vocabulary.width

    def features(self, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor | None = None) -> Tensor:
        """What the heads read in place of the hidden states, teacher-forced.

        `hidden`: [B, T, D] of the base's last layer after its final norm; `positions`: [B, T] int64; `mask`: [B, 1, T, T]
        bool, true where a position may attend; `wanted`: [B, T] bool, the positions that heads will read, None for all. Returns
        [B, T, D], of which only the wanted positions are meaningful.
        """
        return hidden.to(self.weight.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Base embeddings [..., D] of `tokens` [...] int64, RMS-normalised unless the config says otherwise.

        Raw embeddings are an order of magnitude smaller than hidden states: without normalisation they hardly affect a head.
        """
        table = self.vocabulary.embedding
        if self.config.normalise_embeddings and self._head(0).compiled is not None and ops.supports_embed_rms_norm(table):
            return ops.embed_rms_norm(table, tokens, self.norm_eps)
        return self.as_read(F.embedding(tokens, table))

    def as_read(self, raw: Tensor) -> Tensor:
        """Rows [..., D] of the base's embedding, of any float dtype, as `embed` gives them to the heads: [..., D]."""
        raw = raw.to(self.weight.dtype)
        return F.rms_norm(raw, (raw.shape[-1],), eps=self.norm_eps) if self.config.normalise_embeddings else raw

    def outputs(self, token_ids: Tensor, hidden: Tensor, positions: Tensor, mask: Tensor, wanted: Tensor) -> HeadOutputs:
        """What the heads give on a batch, teacher-forced.

        `token_ids`: [B, T] int64; `hidden`: [B, T, D], or wider with the taps that the drafter reads; `positions`, `mask`,
        `wanted`: as `features` takes them.
        """
        features = self.features(last_of(hidden, self.vocabulary.width), positions, mask, wanted)
        return _HeadOutputs(self, features.flatten(0, 1), self.embed(token_ids.flatten()))

    def head_hidden(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        """Output of head `i`: [..., D].

        `features`: [..., D] at position t; `path`: [..., i + 1, D], `embed` of x_{t+1} .. x_{t+1+i}.
        """
        raise NotImplementedError

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., Vd] float32 from states of the base, or the output of heads without rows of
        their own, [..., D]."""
        rows = self.rows if self._packed is None or torch.is_grad_enabled() else self._packed
        return rows(hidden)

    def head_logits(self, i: int, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary [..., Vd] float32 from the output [..., D] of head `i`."""
        own = self._own(i)
        if own is None:
            return self.draft_logits(hidden)
        logits: Tensor = own(hidden, self.draft_vocab)
        return logits

    def candidate_logits(self, i: int, features: Tensor, path: Tensor) -> Tensor:
        """While decoding: logits [B, W, Vd] float32 of head `i` after W paths per sequence.

        `features`: [B, D]; `path`: [B, W, i + 1, D], `embed` of each path's tokens.
        """
        if (compiled := self._head(i).compiled) is not None:
            logits: Tensor = compiled.logits(features, self._path_read(path))
            return logits
        return self.head_logits(i, self.head_hidden(i, features[:, None].expand(-1, path.shape[1], -1), path))

    def candidates(self, i: int, features: Tensor, path: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` most probable tokens by these logits, or all there are, best first: indices [B, W, count] int64 into the
        draft vocabulary and probabilities float32."""
        if (compiled := self._head(i).compiled) is not None:
            indices, values = compiled.top_k(features, self._path_read(path), count)
            return indices, values
        logits = self.candidate_logits(i, features, path)
        best = logits.softmax(-1).topk(min(count, logits.shape[-1]), dim=-1)
        return best.indices, best.values

    def _path_read(self, path: Tensor) -> Tensor:
        """The part of a path that a head reads: nothing where it reads the hidden state alone."""
        return path if self.config.sequential else path[:, :, :0]


@dataclass(frozen=True)
class _HeadOutputs:
    """`features`, `embedded`: [n, D] of the flat tokens; features have a meaning only where heads read them."""

    drafter: HeadDrafter
    features: Tensor
    embedded: Tensor

    def __call__(self, head: int, features: Tensor, path: Tensor) -> Tensor:
        return self.drafter.head_hidden(head, self.features[features], self.embedded[path])
