"""One normal form of a chat, whatever wrote it: the same for `distill`, `batch`, `bench` and over HTTP.

    {"role": "system" | "user" | "assistant" | "tool", "content": text}      and, where they are given:
    "name", "tool_calls", "tool_call_id"

Read are: OpenAI's messages (content as text, as parts of type text, or null beside `tool_calls`), ShareGPT's
`{"from": "human", "value": ...}` and its cousins, and a list written as JSON text. Keys that are null or an empty list are left
out: Parquet fills them in for every message once one message has them, and so do clients. `developer` is OpenAI's later word for
`system`.
"""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
                "bot": "assistant", "model": "assistant", "ai": "assistant", "function": "tool", "observation": "tool",
                "function_call": "assistant"}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")
TEXT_PARTS = ("text", "input_text", "output_text")
OPTIONAL = ("name", "tool_calls", "tool_call_id")
COLUMNS = ("messages", "conversations", "conversation")
"""Columns in which files keep a chat, looked for in this order."""


class BadChat(ValueError):
    """A chat that cannot be read; the text names the message and the key, and says what is wanted."""


def normal_chat(value: Any, strict: bool = False) -> list[dict[str, Any]]:
    """The messages of `value` in the normal form.

    `value`: a list of messages, or JSON text of one. `strict`: a key that is not known is an error, as for a request over
    HTTP; a data set's further keys (`weight`, `id`, ...) say nothing about the chat and are left out.
    Raises BadChat for a value that is no chat.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadChat(f"is text, and not a list of messages as JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(value, list):
        raise BadChat(f"is {_kind(value)}, not a list of messages")
    if not value:
        raise BadChat("is empty")
    return [_message(item, f"[{number}]", strict) for number, item in enumerate(value)]


def without_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The part of a chat that asks: a chat of a data set often ends with the answer, which is not the base's own.

    Raises BadChat where nothing is left.
    """
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] != "system" for message in messages[:end]):
        raise BadChat("holds no user's turn to answer")
    return messages[:end]


def _message(item: Any, where: str, strict: bool) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadChat(f"{where} is {_kind(item)}, not an object with `role` and `content`")
    given = {key: value for key, value in item.items() if value not in (None, [])}  # `annotations: []` of a client's own echo
    role_key = next((key for key in ROLE_KEYS if key in given), None)
    if role_key is None:
        raise BadChat(f"{where} has no `role` (its keys: {', '.join(map(str, item)) or 'none'})")
    role = given[role_key]
    if not isinstance(role, str) or (named := ROLE_ALIASES.get(role.strip().lower(), role.strip().lower())) not in ROLES:
        raise BadChat(f"{where}.{role_key} is {_shown(role)}, not one of {', '.join(ROLES)}")
    content_key = next((key for key in CONTENT_KEYS if key in given), None)
    known = {role_key, content_key, *OPTIONAL}
    if strict and (unknown := [key for key in given if key not in known]):
        raise BadChat(f"{where}.{unknown[0]}: is not known: leave it out")
    optional = {key: given[key] for key in OPTIONAL if key in given}
    if content_key is None:
        if not (named == "assistant" and "tool_calls" in optional):
            missing = "content is null" if "content" in item else f"has no `content` (its keys: {', '.join(map(str, item))})"
            raise BadChat(f"{where}{'.' if missing.startswith('content') else ' '}{missing}: text is wanted")
        content = ""
    else:
        content = _text(given[content_key], f"{where}.{content_key}")
    if named == "user" and not content.strip():
        raise BadChat(f"{where}.{content_key} is empty: a user's turn needs text")
    return {"role": named, "content": content, **optional}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadChat(f"{where} is {_kind(content)}, not text")
    return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise BadChat(f"{where} is {_kind(part)}, not a part of type text")
    if part.get("type") not in TEXT_PARTS:
        raise BadChat(f"{where} is of type {_shown(part.get('type'))}: only text can be read")
    if not isinstance(part.get("text"), str):
        raise BadChat(f"{where}.text is {_kind(part.get('text'))}, not text")
    return str(part["text"])


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text", list: "a list",
             dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:37] + "...")
