"""Names and bytes of single tokens: the bytes of all of them are the text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

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


PIECES = ("</s>", "\u2581Hello", "\u2581world", "lo", "é", "\u2581", "<0xE6>", "<0x97>", "<0xA5>", "\ufffd", "a")


@pytest.fixture
def sentencepiece() -> Any:
    """A base with the decoder of Llama 2's tokenizer."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    return SimpleNamespace(tokenizer=fast, decode=lambda ids: fast.decode(ids, skip_special_tokens=True))


def test_spaces_and_bytes_as_sentencepiece_writes_them(sentencepiece: Any) -> None:
    """A word's space belongs to its token, but for the first one of an answer."""
    names, ids = TokenTexts(sentencepiece), [1, 2, 3, 5, 6, 7, 8, 4, 9]
    assert sentencepiece.decode(ids) == "Hello worldlo 日é\ufffd"
    tokens = [names.named(token, -1.0, first=place == 0) for place, token in enumerate(ids)]
    assert b"".join(token.bytes for token in tokens).decode() == "Hello worldlo 日é\ufffd"
    assert [token.text for token in tokens[:3]] == ["Hello", " world", "lo"] and names.named(1, 0.0).text == " Hello"
    assert names.named(6, 0.0) == Token("\ufffd", 0.0, b"\xe6") and names.named(0, 0.0) == Token("</s>", 0.0, b"")


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
