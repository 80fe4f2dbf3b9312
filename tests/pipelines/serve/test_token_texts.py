"""Names and bytes of single tokens: the bytes of all of them are the text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hydra_core.base import Base
from pipelines.serve.messages import Token
from pipelines.serve.openai.responses import CHAT, TEXT, logprobs
from pipelines.serve.token_texts import TokenTexts


def test_parts_of_characters_have_their_bytes(tiny_base: Base) -> None:
    names, text = TokenTexts(tiny_base), "é 日本語 ok"
    tokens = [names.named(token, -0.5) for token in tiny_base.tokenizer(text).input_ids]
    assert len(tokens) == len(text.encode()) and b"".join(token.bytes for token in tokens).decode() == text
    assert "\ufffd" in {token.text for token in tokens}


def test_the_end_of_a_turn_has_a_name_and_no_bytes(tiny_base: Base) -> None:
    names = TokenTexts(tiny_base)
    (end,) = tiny_base.stop_ids
    assert names.named(end, -1.0) == Token("</s>", -1.0, b"")
    assert names.named(287, -1.0) == Token("<287>", -1.0, b"")  # a row that is no token


def test_bytes_as_sentencepiece_writes_them() -> None:
    tokenizer = SimpleNamespace(convert_ids_to_tokens={1: "<0xE6>", 2: "\u2581\ufffd"}.__getitem__)
    base: Any = SimpleNamespace(tokenizer=tokenizer, decode=lambda ids: "\ufffd")
    assert TokenTexts(base).named(1, 0.0).bytes == b"\xe6"
    assert TokenTexts(base).named(2, 0.0).bytes == "\ufffd".encode()  # a token that is this character


def test_log_probabilities_in_openais_shape() -> None:
    part = Token("\ufffd", -0.5, b"\xe6", (Token("\ufffd", -0.5, b"\xe6"), Token("a", -2.0, b"a")))
    end = Token("</s>", -0.1, b"")
    assert logprobs(CHAT, [part, end], 0)["content"] == [
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xe6], "top_logprobs": [
            {"token": "\ufffd", "logprob": -0.5, "bytes": [0xe6]}, {"token": "a", "logprob": -2.0, "bytes": [0x61]}]},
        {"token": "</s>", "logprob": -0.1, "bytes": [], "top_logprobs": []}]
    found = logprobs(TEXT, [part, end], 3)
    assert (found["tokens"], found["text_offset"], found["top_logprobs"]) == (
        ["\ufffd", "</s>"], [3, 4], [{"\ufffd": -0.5, "a": -2.0}, {"</s>": -0.1}])
