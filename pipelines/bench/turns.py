"""The turns of a question in `bench`: what is said after the first one follows plain decoding's own answers.

Every contender reads the same context, whoever would have answered otherwise; so plain's answers to the earlier turns of
the same round must stand before a later one is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra_core.base import Base
from hydra_core.errors import InputError
from pipelines.bench.plan import Question


def turns_of(question: Question) -> range:
    """Its turns, from 0: one alone where the words of further ones are not known."""
    return range(max(1, len(question.turns)))


def prompt_of(question: Question, answers: Sequence[tuple[int, ...]], base: Base, room: int) -> tuple[int, ...]:
    """Token ids of the turn after `answers`, plain's to the turns before it: the chat template applied to the user's words
    and the answers' texts, without the token that ended them.

    Raises InputError when it leaves no room for an answer in `room` tokens, or the base has no chat template.
    """
    if not answers:
        return question.prompt_ids
    messages = []
    for said, answer in zip(question.turns, answers, strict=False):
        ended = bool(answer) and answer[-1] in base.stop_ids
        messages += [{"role": "user", "content": said},
                     {"role": "assistant", "content": base.decode(answer[:-1] if ended else answer)}]
    ids = base.encode_prompt(messages=[*messages, {"role": "user", "content": question.turns[len(answers)]}])
    if len(ids) >= room:
        raise InputError(f"prompt: has {len(ids)} tokens, there is room for {room - 1}")
    return tuple(ids)


def room_for_turns(base: Base, max_new_tokens: int, questions: Sequence[Question]) -> int:
    """Tokens a row needs for the longest conversation, at most what the base holds. An answer that is read again as text
    may have other tokens than it was written with, so it is given twice its own."""
    longest = max(len(question.prompt_ids) + sum(len(base.encode_prompt(said)) + 2 * max_new_tokens
                                                 for said in question.turns[1:]) for question in questions)
    return min(base.context_limit, longest + max_new_tokens)
