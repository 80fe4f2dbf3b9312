"""Text to token ids, once: the chat template applied, nothing tokenised a second time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra_core.errors import InputError

log = logging.getLogger(__name__)
_MARK = "\u241fuser-turn\u241f"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, or None with one log line where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        log.warning("the base has no tokenizer: only token ids can be decoded (%s)", str(error).splitlines()[0])
        return None


def encode_prompt(tokenizer: Any, prompt: str | None = None, messages: list[dict[str, Any]] | None = None) -> list[int]:
    """Token ids ready to be answered: the chat template with its opening of the assistant's turn.

    A raw prompt becomes one user turn where the base has a template and is tokenised as it is elsewhere. Raises
    InputError for messages without a template, an empty prompt, or messages the template refuses.
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
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs: any mistake in messages may raise anything
        raise InputError(f"messages: the chat template refuses them ({(str(error) or 'no message').splitlines()[0]})") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def user_turn_opening(tokenizer: Any) -> list[int]:
    """Token ids of everything the template puts before a user's own words.

    Given this alone, an aligned base goes on by writing a user turn (Magpie, arXiv 2406.08464). Raises InputError for a
    base without a chat template, or one whose template does not keep the words as they are.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InputError("prompts.source=self: the base has no chat template to open a user turn with: "
                         "set prompts.source to jsonl, parquet or datasets")
    text = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    opening, found, _ = text.partition(_MARK)
    if not found:
        raise InputError("prompts.source=self: the base's chat template changes a user's words: give prompts of your own")
    return list(tokenizer(opening, add_special_tokens=False).input_ids)
