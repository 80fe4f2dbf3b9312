"""Text to token ids: the chat template is applied once, and no text is tokenised twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError

log = logging.getLogger(__name__)
_MARK = "\u241fuser-turn\u241f"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, or None, with a warning, if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        log.warning("the base has no tokenizer, so prompts must be token ids (%s)", str(error).splitlines()[0])
        return None


def encode_prompt(tokenizer: Any, prompt: str | None = None, messages: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids of a prompt, or of messages by the chat template, up to the beginning of the assistant's turn.

    With a chat template a prompt becomes one user turn; without one it is tokenised as it is. Raises InputError for messages
    without a chat template, for an empty prompt, and for messages that the template rejects.
    """
    if tokenizer is None:
        raise InputError("prompt: the base has no tokenizer: give token ids")
    template = getattr(tokenizer, "chat_template", None)
    if messages is None:
        if not prompt:
            raise InputError("prompt: is empty")
        if not template:
            return list(tokenizer(prompt).input_ids)
        messages = [{"role": "user", "content": prompt}]
    if not template:
        raise InputError("messages: the base has no chat template: give a plain prompt")
    if not messages:
        raise InputError("messages: is empty")
    if "tool_calls" not in str(template):  # a call that the template leaves out would be lost without a word
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                raise InputError(f"messages[{number}].tool_calls: the base's chat template does not render tool calls")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, which may raise anything for wrong messages
        raise InputError(f"messages: the chat template rejects them ({(str(error) or 'no message').splitlines()[0]})") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def user_turn_opening(tokenizer: Any) -> list[int]:
    """Token ids of all that the chat template puts before a user's own words.

    An aligned base that is given only these continues with a user turn (Magpie, arXiv 2406.08464). Raises InputError for a
    base without a chat template, or with one that changes the user's words.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError("prompts.source=self: the base has no chat template to open a user turn with: "
                         "set prompts.source to jsonl, parquet or datasets")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    opening, found, _ = text.partition(_MARK)
    if not found:
        raise InputError("prompts.source=self: the base's chat template changes a user's words: give prompts of your own")
    return list(tokenizer(opening, add_special_tokens=False).input_ids)
