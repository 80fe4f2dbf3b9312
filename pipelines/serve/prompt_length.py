"""Prompts that are too long are refused before they are tokenised, which takes a second for each megabyte."""

from __future__ import annotations

import json
from typing import Any

from hydra_core.errors import InputError

COMPOSED = 4
"""Characters that Unicode's composition makes one of, at most."""
NORMALISERS = {"NFC": COMPOSED, "NFKC": COMPOSED, "Prepend": 1, "Replace": 1}
"""Normalisers that do not drop text, with how many characters they may make one of. (`Replace` writes spaces as another sign.)"""


class PromptLength:
    """The most tokens of a prompt, and how many characters that many tokens can stand for.

    `longest`: characters of a token at most, None where a token may stand for any number of them.
    """

    def __init__(self, tokenizer: Any, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.longest = longest_text(tokenizer) if tokenizer is not None else None

    def check(self, texts: list[str]) -> None:
        """Raise InputError when `texts` together are surely more tokens than a prompt may have."""
        length = sum(len(text) for text in texts)
        if self.longest is not None and length > self.most_tokens * self.longest:
            raise InputError(f"prompt: {length} characters are more than the {self.most_tokens} tokens allowed here can hold: "
                             "shorten it")

    def check_tokens(self, count: int) -> None:
        """Raise InputError for a prompt of `count` tokens that is too long."""
        if count > self.most_tokens:
            raise InputError(f"prompt: {count} tokens are more than the {self.most_tokens} allowed here")


def longest_text(tokenizer: Any) -> int | None:
    """Characters that a token of `tokenizer` stands for at most; None where that has no limit: an unknown word is one token
    whatever its length, and some normalisers and special tokens take away any number of spaces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = json.loads(backend.to_str())
    every_byte = settings["model"].get("byte_fallback") or "ByteLevel" in _kinds(settings.get("pre_tokenizer"))
    if settings["model"].get("type") != "BPE" or not every_byte:
        return None
    if any(token["lstrip"] or token["rstrip"] for token in settings.get("added_tokens", [])):
        return None
    composed = 1
    for kind in _kinds(settings.get("normalizer")):
        if kind not in NORMALISERS:
            return None
        composed = max(composed, NORMALISERS[kind])
    return composed * max(len(written) for written in tokenizer.get_vocab())


def _kinds(part: dict[str, Any] | None) -> list[str]:
    """The kinds of a normaliser or pre-tokeniser and of those that it consists of."""
    if part is None:
        return []
    inner = part.get("normalizers") or part.get("pretokenizers")
    return [kind for each in inner for kind in _kinds(each)] if inner is not None else [part["type"]]


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """The texts of a chat that every template writes out, without the spaces around them, which some leave out."""
    return [message["content"].strip() for message in messages
            if message.get("role") == "user" and isinstance(message.get("content"), str)]
