"""The frozen base model: text to ids, ids to hidden states, hidden states to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hydra_core.base.kv_cache import KVCache, Step
from hydra_core.base.text import encode_prompt
from hydra_core.base.vocabulary import BaseIdentity, BaseVocabulary
from hydra_core.tree.batch import TreeBatch, chain

PREFILL_CHUNK = 512  # tokens of a prompt in one forward: bounds the mask and the activations


class Decoder(Protocol):
    """What runs the layers: `fused.FusedDecoder`, `fallback.TransformersDecoder` or `sequential.SequentialDecoder`.

    `supports_tree`: whether its cache can hold a tree, share beginnings and take a prompt in pieces; `ragged`: whether nodes that
    are not real cost nothing.
    """

    supports_tree: bool
    ragged: bool

    def allocate(self, rows: int, slots: int) -> Any: ...

    def cache_bytes(self, rows: int, slots: int) -> int: ...

    def __call__(self, ids: Tensor, cache: Any, step: Step, counts: Tensor | None = None) -> Tensor:
        """Token ids [B, N] to hidden states after the final norm [B, N, D]; writes what the cache keeps of the nodes.

        `counts`: [B] how many of a row's tokens, the first ones, are real, where rows are padded; None when all are. What
        stands at the others is of no meaning.
        """
        ...


class Base:
    """A frozen causal language model with its tokenizer; see `load.load_base`."""

    def __init__(self, vocabulary: BaseVocabulary, decoder: Decoder, tokenizer: Any, context_limit: int,
                 device: torch.device) -> None:
        self.vocabulary, self.decoder, self.tokenizer = vocabulary, decoder, tokenizer
        self.context_limit, self.device = context_limit, device

    @property
    def identity(self) -> BaseIdentity:
        """Name, digest and weight format: what heads and results belong to."""
        return self.vocabulary.identity

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and embeddings."""
        return self.vocabulary.embedding.dtype

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer unless a request names others."""
        return self.vocabulary.stop_ids

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.vocabulary.size

    @property
    def supports_tree(self) -> bool:
        """Whether a draft tree can be verified; else only plain decoding is possible."""
        return self.decoder.supports_tree

    @property
    def ragged(self) -> bool:
        """Whether a forward costs no more for nodes that are not real, so that rows may have as many as each is worth."""
        return self.decoder.ragged

    def allocate(self, rows: int, slots: int) -> KVCache:
        """A cache for `rows` sequences of at most `slots` tokens, draft nodes included."""
        cache: KVCache = self.decoder.allocate(rows, slots)
        return cache

    @torch.inference_mode()
    def forward(self, ids: Tensor, cache: KVCache, rows: tuple[int, int], forest: TreeBatch,
                counts: Tensor | None = None) -> Tensor:
        """One forward of [B, N] token ids on top of what cache `rows` hold: hidden states [B, N, D].

        Node j of a row stands at position length + depth(j) and sees the row's committed tokens and its ancestors. The
        nodes' keys and values are written but not committed. `counts`: [B] real tokens of rows that are padded, the first
        of each; the others' hidden states are of no meaning.
        """
        return self.decoder(ids, cache, cache.plan(rows, forest), counts)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V] float32."""
        return self.vocabulary.head(hidden)

    def argmax(self, hidden: Tensor) -> Tensor:
        """[..., D] to the likeliest token [...] int64, of equals the first."""
        return self.vocabulary.head.argmax(hidden)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache, rows: tuple[int, int]) -> Tensor:
        """Compute and commit whole prompts into cache `rows`: hidden states [B, T, D], junk past each prompt's end.

        Rows are padded to the longest of them, and long prompts go through in chunks.
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
            pieces.append(self.forward(chunk, cache, rows, chain(chunk.shape[1]), real))
            cache.lengths[rows[0]:rows[1]] += real
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Teacher-forced features of whole sequences: for each a [T, D] tensor in the base's dtype."""
        longest = max(len(sequence) for sequence in sequences)
        cache = self.allocate(len(sequences), longest)
        hidden = self.prefill(sequences, cache, (0, len(sequences)))
        return [hidden[row, :len(sequence)] for row, sequence in enumerate(sequences)]

    def encode_prompt(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None) -> list[int]:
        """As `text.encode_prompt`, with the base's own tokenizer."""
        return encode_prompt(self.tokenizer, prompt, messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)
