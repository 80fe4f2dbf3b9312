"""The frozen base model: text to ids, ids to hidden states, hidden states to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hydra_core.base.kv_cache import AttentionMetadata, KVCache
from hydra_core.base.text_base import TextBase
from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary
from hydra_core.tree.batch import TreeBatch, chain

PREFILL_CHUNK = 512  # tokens of a prompt in one forward, which bounds the memory of the mask and the activations


class Decoder(Protocol):
    """Runs the layers: `fused.FusedDecoder`, `fallback.TransformersDecoder` or `sequential.SequentialDecoder`.

    `supports_tree`: whether its cache can hold a tree, share the beginnings of prompts and take a prompt in pieces; `ragged`:
    whether nodes that only pad a row cost nothing.
    """

    supports_tree: bool
    ragged: bool

    def allocate(self, rows: int, slots: int) -> Any: ...

    def cache_bytes(self, rows: int, slots: int) -> int: ...

    def __call__(self, ids: Tensor, cache: Any, metadata: AttentionMetadata, counts: Tensor | None = None,
                 taps: Sequence[int] = ()) -> Tensor:
        """Token ids [B, N] to hidden states after the final norm [B, N, D]; writes the nodes' keys and values to the cache.

        `counts`: [B], how many tokens of each row, the first ones, are real; None when all are. The hidden states of the others
        have no meaning. `taps`: layers whose input is wanted too, behind the hidden states, see `taps.py`.
        """
        ...


class Base(TextBase):
    """A frozen causal language model with its tokenizer; see `load.load_base`."""

    def __init__(self, vocabulary: BaseVocabulary, decoder: Decoder, tokenizer: Any, context_limit: int,
                 device: torch.device) -> None:
        self.vocabulary, self.decoder, self.tokenizer = vocabulary, decoder, tokenizer
        self.context_limit, self.device = context_limit, device

    @property
    def identity(self) -> BaseIdentity:
        return self.vocabulary.identity

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and embeddings."""
        return self.vocabulary.embedding.dtype

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.vocabulary.stop_ids

    @property
    def vocab_size(self) -> int:
        return self.vocabulary.size

    @property
    def supports_tree(self) -> bool:
        """Whether the base can verify a draft tree; otherwise only plain decoding is possible."""
        return self.decoder.supports_tree

    @property
    def ragged(self) -> bool:
        """Whether nodes that only pad a row cost nothing, so that each row may have its own number of nodes."""
        return self.decoder.ragged

    def allocate(self, rows: int, slots: int) -> KVCache:
        """A cache for `rows` sequences of at most `slots` tokens, draft nodes included."""
        cache: KVCache = self.decoder.allocate(rows, slots)
        return cache

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache, rows: tuple[int, int], trees: TreeBatch,
                counts: Tensor | None = None, taps: Sequence[int] = (), written: int = 0) -> Tensor:
        """One forward of token ids [B, N] after the committed tokens of the cache's `rows`: hidden states [B, N, D], with
        `taps` [B, N, (1 + T) * D], see `taps.py`.

        Node j of a row has the position length + depth(j); it sees the row's committed tokens, its ancestors and itself. The
        nodes' keys and values are written but not committed. `counts`: [B], how many tokens of each row, the first ones, are
        real; None when all are. The hidden states of the others have no meaning. `written`: so many nodes of `trees`, the first
        ones, are in the cache from earlier calls, and `ids` are the tokens of the others.
        """
        return self.decoder(ids, cache, cache.build_metadata(rows, trees, written=written), counts, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return self.vocabulary.head(hidden)

    def argmax(self, hidden: Tensor) -> Tensor:
        """The argmax [...] int64 of the logits of hidden states [..., D], the first among equals."""
        return self.vocabulary.head.argmax(hidden)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache, rows: tuple[int, int],
                taps: Sequence[int] = ()) -> Tensor:
        """Compute whole prompts into the cache's `rows` and commit them: hidden states [B, T, D], or with `taps` behind them.

        T is the length of the longest prompt; states past a prompt's end have no meaning. Long prompts are computed in chunks.
        """
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, :len(prompt)] = torch.as_tensor(prompt)
        ids = ids.to(self.device)
        counts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        cache.clear_rows(rows)
        pieces = []
        size = PREFILL_CHUNK if self.decoder.supports_tree else longest
        for start in range(0, longest, size):
            chunk = ids[:, start:start + size]
            real = (counts - start).clamp(0, chunk.shape[1])
            pieces.append(self.forward(chunk, cache, rows, chain(chunk.shape[1]), real, taps))
            cache.lengths[rows[0]:rows[1]] += real
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def hidden_states(self, sequences: Sequence[Sequence[int]], taps: Sequence[int] = ()) -> list[Tensor]:
        """Hidden states of whole sequences, teacher forced: a tensor [T, D] in the base's dtype for each, with `taps` behind
        it [T, (1 + len(taps)) * D]."""
        longest = max(len(sequence) for sequence in sequences)
        cache = self.allocate(len(sequences), longest)
        hidden = self.prefill(sequences, cache, (0, len(sequences)), taps)
        return [hidden[row, :len(sequence)] for row, sequence in enumerate(sequences)]
