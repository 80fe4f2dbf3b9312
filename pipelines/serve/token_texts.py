"""Single tokens as log probabilities name them: their text, and their bytes even where they are a part of a character."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from hydra_core.base import TextBase
from pipelines.serve.messages import Token

REPLACEMENT = "\ufffd"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte that is no character of its own."""


class TokenTexts:
    """The names of a base's tokens, each worked out once: with `top_logprobs` there are twenty at each position."""

    def __init__(self, base: TextBase) -> None:
        self.base = base
        self._known: dict[tuple[int, bool], tuple[str, bytes]] = {}
        self._letter: int | None = None

    def named(self, token: int, logprob: float, top: tuple[Token, ...] = (), first: bool = False) -> Token:
        """`token` with its text and bytes. `first`: no token of the answer comes before it; some tokenizers leave out the space
        before a word there."""
        if (token, first) not in self._known:
            self._known[token, first] = self._name(token, first)
        text, value = self._known[token, first]
        return Token(text, logprob, value, top)

    def _any_letter(self) -> int:
        """A token whose text is one letter."""
        if self._letter is None:
            self._letter = next(token for token in range(len(self.base.tokenizer))
                                if len(text := self.base.decode([token])) == 1 and text.isalpha())
        return self._letter

    def _name(self, token: int, first: bool) -> tuple[str, bytes]:
        text = self.base.decode([token]) if first else self.base.decode([self._any_letter(), token])[1:]
        if text and REPLACEMENT not in text:
            return text, text.encode()
        tokenizer: Any = self.base.tokenizer
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding that is no token
            return f"<{token}>", b""
        if not text:  # a special token, which is no text
            return str(piece), b""
        if found := BYTE.fullmatch(piece):
            return text, bytes([int(found[1], 16)])
        value = [_bytes_of_characters().get(character) for character in piece]
        return text, text.encode() if None in value else bytes(byte for byte in value if byte is not None)


@cache
def _bytes_of_characters() -> dict[str, int]:
    """The bytes that the characters of byte-level tokenizers stand for (GPT-2's table, which all of them use)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
