"""Chats in every form that data sets and clients write come to one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.rows.conversations import ROLES, BadChat, normal_chat, without_answer

PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi."},
         {"role": "assistant", "content": "Hi."}]
CALL = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize("written", [
    PLAIN, json.dumps(PLAIN),
    [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "Hi."}],
    [{"from": "system", "text": "Be brief."}, {"from": "Prompter", "text": "Say hi."}, {"from": "model", "text": "Hi."}],
    [{"role": "developer", "content": "Be brief."}, {"role": "USER", "content": "Say hi."},
     {"role": "assistant", "content": "Hi."}],
    [{**message, "name": None, "tool_calls": None, "tool_call_id": None, "weight": 0.5} for message in PLAIN],
    [{**message, "tool_calls": []} for message in PLAIN],
    [{"role": message["role"], "content": [{"type": "text", "text": message["content"][:3]},
                                           {"type": "input_text", "text": message["content"][3:]}]} for message in PLAIN]])
def test_one_normal_form(written: Any) -> None:
    assert normal_chat(written) == PLAIN


def test_tool_turns_are_kept_whole() -> None:
    chat = [{"role": "user", "content": "Add.", "name": "ann"}, {"role": "assistant", "content": None, "tool_calls": CALL},
            {"role": "tool", "content": "4", "tool_call_id": "c1"}]
    assert normal_chat(chat, strict=True) == [chat[0], {"role": "assistant", "content": "", "tool_calls": CALL}, chat[2]]


@pytest.mark.parametrize(("chat", "told"), [
    ([], "is empty"), ({}, "is an object, not a list of messages"), ("Say hi.", "is text, and not a list of messages as JSON"),
    (None, "is null, not a list"), ([3], r"\[0\] is a number, not an object"),
    ([{"content": "a"}], r"\[0\] has no `role`.*content"),
    ([{"role": "user", "content": "a"}, {"role": "king", "content": "b"}], r"\[1\]\.role is 'king', not one of system, user"),
    ([{"role": 3, "content": "a"}], r"\[0\]\.role is 3"), ([{"role": "user"}], r"\[0\] has no `content` \(its keys: role\)"),
    ([{"role": "user", "content": None}], r"\[0\]\.content is null"),
    ([{"role": "user", "content": 5}], r"\[0\]\.content is a number"),
    ([{"role": "user", "content": " "}], r"\[0\]\.content is empty"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
     r"\[0\]\.content\[0\] is of type 'image_url': only text"),
    ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"\[0\]\.content\[0\]\.text is a number")])
def test_what_is_no_chat_names_message_and_key(chat: Any, told: str) -> None:
    with pytest.raises(BadChat, match=told):
        normal_chat(chat)


def test_unknown_keys_are_an_error_where_a_client_sends_them() -> None:
    chat = [{"role": "user", "content": "a", "id": 1}]
    assert normal_chat(chat) == [{"role": "user", "content": "a"}]
    with pytest.raises(BadChat, match=r"\[0\]\.id: is not known"):
        normal_chat(chat, strict=True)


def test_the_answer_goes() -> None:
    assert without_answer(normal_chat(PLAIN)) == PLAIN[:2] == without_answer(PLAIN[:2])
    for chat in (PLAIN[2:], PLAIN[:1], [PLAIN[0], PLAIN[2]]):
        with pytest.raises(BadChat, match="holds no user's turn to answer"):
            without_answer(chat)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["role", "from", "content", "value", "type", "text", "tool_calls", "x"]), inner,
                        max_size=4),
                    max_leaves=12)


MESSAGE = st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "human", "developer"]), "content": JSON})


@given(JSON | st.lists(MESSAGE, max_size=3), st.booleans())
def test_any_value_is_a_chat_in_the_normal_form_or_a_bad_one(value: Any, strict: bool) -> None:
    try:
        chat = normal_chat(value, strict)
    except BadChat as error:
        assert "\n" not in str(error)
        return
    assert chat == normal_chat(chat, strict=True) and all(message["role"] in ROLES for message in chat)
    assert all(isinstance(message["content"], str) for message in chat)
