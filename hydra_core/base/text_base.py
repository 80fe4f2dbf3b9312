"""The base as far as texts and token ids go: all that answers need of it where another engine holds its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra_core.base.text import encode_prompt
from hydra_core.base.vocabulary import BaseIdentity


class TextBase:
    """What a base with weights (`model.Base`) and one without (`WeightlessBase`) share.

    `tokenizer`: None where the base has none; `context_limit`: tokens of prompt and answer.
    """

    tokenizer: Any
    context_limit: int

    @property
    def identity(self) -> BaseIdentity:
        """Name, digest and weight format of this base; checkpoints of heads and results record it."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer, unless a request names others."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        raise NotImplementedError

    def encode_prompt(self, prompt: str | None = None, messages: list[dict[str, Any]] | None = None) -> list[int]:
        """As `text.encode_prompt`, with the base's own tokenizer."""
        return encode_prompt(self.tokenizer, prompt, messages)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class WeightlessBase(TextBase):
    """A base without its weights; see `load.load_weightless`. `folder`: of transformers, where another engine finds them."""

    def __init__(self, folder: Path, identity: BaseIdentity, tokenizer: Any, stop_ids: tuple[int, ...], vocab_size: int,
                 context_limit: int) -> None:
        self.folder, self._identity, self.tokenizer = folder, identity, tokenizer
        self._stop_ids, self._vocab_size, self.context_limit = stop_ids, vocab_size, context_limit

    @property
    def identity(self) -> BaseIdentity:
        return self._identity

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    @property
    def vocab_size(self) -> int:
        return self._vocab_size
