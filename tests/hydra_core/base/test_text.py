"""Text to ids: the template is applied once, and every rejection is one clear line."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from hydra_core.base import encode_prompt, user_turn_opening
from hydra_core.errors import InputError
from tests.tiny import make_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def test_the_template_is_applied_once() -> None:
    tokenizer = make_tokenizer()
    ids = encode_prompt(tokenizer, "hi")
    assert tokenizer.decode(ids) == "<s>user\nhi</s><s>assistant\n"
    assert ids == encode_prompt(tokenizer, messages=[{"role": "user", "content": "hi"}])
    assert tokenizer.decode(encode_prompt(tokenizer, messages=MESSAGES)).startswith("<s>system\nbe brief</s>")


def test_a_base_without_a_template_takes_plain_prompts_alone() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "hi"
    with pytest.raises(InputError, match="messages: the base has no chat template: give a plain prompt"):
        encode_prompt(tokenizer, messages=MESSAGES)
    with pytest.raises(InputError, match=r"prompts\.source=self: the base has no chat template"):
        user_turn_opening(tokenizer)


def test_a_beginning_of_text_is_written_once() -> None:
    """A tokenizer that puts <s> before every text: a plain prompt gets it, a template that writes it gets no second one."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert encode_prompt(tokenizer, "hi").count(1) == 2  # of the user's and of the assistant's turn
    assert encode_prompt(tokenizer, "hi")[:2] == [1, *tokenizer("user", add_special_tokens=False).input_ids[:1]]
    assert user_turn_opening(tokenizer).count(1) == 1
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, "hi") == [1, *tokenizer("hi", add_special_tokens=False).input_ids]


def test_what_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match="prompt: is empty"):
        encode_prompt(tokenizer, "")
    with pytest.raises(InputError, match="messages: is empty"):
        encode_prompt(tokenizer, messages=[])
    with pytest.raises(InputError, match="the base has no tokenizer: give token ids"):
        encode_prompt(None, "hi")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="the chat template rejects them"):
        encode_prompt(tokenizer, messages=MESSAGES)


def test_a_user_turn_is_opened_and_left_open() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(user_turn_opening(tokenizer)) == "<s>user\n"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | length }}{% endfor %}"
    with pytest.raises(InputError, match="changes a user's words"):
        user_turn_opening(tokenizer)
