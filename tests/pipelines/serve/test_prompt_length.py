"""Which texts are surely too long, and that nothing is tokenised to find it out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_core.errors import InputError
from pipelines.config import load_config
from pipelines.serve.messages import Answer, AppArgs, Generation, Refusal
from pipelines.serve.prompt_length import PromptLength, longest_text
from pipelines.serve.replica import DecodeServer
from pipelines.serve.user_config import heads_of
from tests.tiny import make_tokenizer


def bpe(byte_fallback: bool = False, normalizer: object = None, added: tuple[AddedToken, ...] = (), level: bool = False,
        unigram: bool = False) -> PreTrainedTokenizerFast:
    vocab = {"a": 0, "b": 1, "ab": 2, "<unk>": 3}
    model = models.Unigram([(piece, -1.0) for piece in vocab], 3) if unigram else models.BPE(
        vocab=vocab, merges=[("a", "b")], unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if level:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
    tokenizer.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_how_much_text_a_token_may_stand_for() -> None:
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    assert longest_text(bpe(level=True)) == len("<unk>") == longest_text(bpe(byte_fallback=True, normalizer=spaces))
    assert longest_text(bpe(level=True, added=(AddedToken("<|a long one|>", special=True),))) == len("<|a long one|>")
    assert longest_text(bpe(level=True, normalizer=normalizers.NFC())) == 4 * len("<unk>")
    assert longest_text(make_tokenizer()) == len("<unk>")
    # tokens that may stand for any number of characters
    assert longest_text(bpe()) is None and len(bpe()("é" * 1000).input_ids) == 1
    assert longest_text(bpe(unigram=True)) is None
    assert longest_text(bpe(level=True, normalizer=normalizers.Strip())) is None
    assert longest_text(bpe(level=True, added=(AddedToken("<m>", lstrip=True),))) is None
    assert longest_text(object()) is None


def test_no_text_within_the_limit_is_refused() -> None:
    """A text of the longest tokens, at the limit and one character over it."""
    length = PromptLength(make_tokenizer(), 7)
    length.check(["<unk>" * 7])
    assert len(make_tokenizer()("<unk>" * 7).input_ids) == 7
    with pytest.raises(InputError, match="prompt: 36 characters are more than the 7 tokens allowed here can hold"):
        length.check(["<unk>" * 3, "<unk>" * 4 + "a"])
    PromptLength(bpe(), 7).check(["é" * 10**6])
    PromptLength(None, 7).check(["é" * 10**6])


@pytest.mark.parametrize("most", [None, 100])
def test_a_replica_tokenises_no_text_that_is_too_long(tiny_base_dir: Path, tmp_path: Path, most: int | None,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_config(None, {"base.model": str(tiny_base_dir), "base.dtype": "fp32", "storage": "/s"}).base
    server = DecodeServer(AppArgs(base.model_dump(), str(tmp_path), None, "plain", threads=1, max_prompt_tokens=most))
    asyncio.run(server.reconfigure(heads_of(server.args)))
    limit = most or 256
    long, spaces = "x" * (5 * limit + 1), " " * (5 * limit + 1)

    def ask(**fields: object) -> Answer | Refusal:
        return asyncio.run(server.generate(Generation("g", 3, **fields)))  # type: ignore[arg-type]

    found = ask(messages=[{"role": "assistant", "content": spaces}, {"role": "user", "content": "x" * limit}])
    assert isinstance(found, Refusal) and "tokens" in found.message and "characters" not in found.message  # counted, not guessed
    asked = [{"prompt": long}, {"text": long}, {"messages": [{"role": "user", "content": long[:3 * limit]}] * 2}]
    monkeypatch.setattr(type(server.base.tokenizer), "__call__", lambda *rest, **more: pytest.fail("tokenised"))
    for fields in asked:
        found = ask(**fields)
        field = next(iter(fields)).replace("text", "prompt")
        assert isinstance(found, Refusal) and found.status == 400, found
        assert found.message.startswith(f"{field}: ") and f"characters are more than the {limit} tokens" in found.message
    assert server.engine_loop is not None
    server.engine_loop.close()
