"""Which prompts `bench` decodes: those of a file, spread over its tasks, or this run's held-out ones; and their later turns.

A later turn follows plain decoding's own answers, so every contender reads the same context whatever it answered itself.
Plain's answers to the earlier turns of a round must therefore exist before a later turn is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

from hydra_core.base import Base, context_limit, load_tokenizer, resolve_base
from hydra_core.errors import InputError
from pipelines.bench.plan import Question
from pipelines.config import RunConfig
from pipelines.distill.file_prompts import prompt_ids_of
from pipelines.rows.parquet_parts import read_parts
from pipelines.rows.prompt_reader import PromptRow, RowError, read_prompt_rows
from pipelines.rows.schemas import PROMPTS
from pipelines.runtime.artifacts import RunPaths, require_manifest
from pipelines.runtime.console import say

DEFAULT_QUESTIONS = 24
TASKS = dict.fromkeys(("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"), "conversation")
"""Category -> task of Spec-Bench: MT-Bench's eight categories are one task, the other five tasks are categories themselves."""


def load_questions(config: RunConfig) -> tuple[list[Question], list[dict[str, str]]]:
    """The prompts to decode, from a file or this run's held-out ones, and error rows for prompts that are not usable.

    Raises InputError when no prompt is usable.
    """
    where = config.bench.prompts or str(RunPaths.of(config).stage("distill") / "prompts")
    longest = context_limit(config.base.model, cache=RunPaths.of(config).cache, asked=config.base.context_limit) - 1
    questions: dict[str, Question] = {}
    errors = []
    for row, found in _questions_of_file(config) if config.bench.prompts else _held_out(config):
        if isinstance(found, Question) and len(found.prompt_ids) > longest:
            found = RowError(row, f"row {row}: prompt: has {len(found.prompt_ids)} tokens, the context has room for {longest}")
        if isinstance(found, RowError):
            say("bench", f"{where}: {found.message}: left out")
            errors.append({"id": f"{where}:{row}", "stage": "bench", "message": found.message})
            continue
        if found.id in questions:  # result rows are identified by question id
            found = replace(found, id=f"{found.id}#{row}")
        questions[found.id] = found
    if not questions:
        raise InputError(f"bench.prompts={where}: has no usable prompt" + (f": {errors[0]['message']}" if errors else ""))
    say("bench", f"{len(questions) + len(errors)} prompts read = {len(questions)} ok + {len(errors)} errors")
    return list(questions.values()), errors


def _held_out(config: RunConfig) -> Iterator[tuple[int, Question]]:
    folder = RunPaths.of(config).stage("distill")
    require_manifest(folder, "distill")
    rows = [row for row in read_parts(folder / "prompts", PROMPTS).to_pylist() if row["split"] == "held_out"]
    rows = sorted(rows, key=lambda row: row["prompt_id"])[:config.bench.limit or DEFAULT_QUESTIONS]
    if not rows:
        raise InputError("bench.prompts: this run has no held-out prompt: name a JSONL file")
    for number, row in enumerate(rows, start=1):
        yield number, Question(row["prompt_id"], row["source"].split("/")[0], tuple(row["prompt_ids"]))


def _questions_of_file(config: RunConfig) -> Iterator[tuple[int, Question | RowError]]:
    assert config.bench.prompts is not None
    tokenizer = load_tokenizer(resolve_base(config.base.model, RunPaths.of(config).cache).folder)
    for item in _spread(list(read_prompt_rows(config.bench.prompts, "prompt", None)), config.bench.limit):
        ids = item if isinstance(item, RowError) else prompt_ids_of(item, tokenizer)
        if isinstance(item, RowError) or isinstance(ids, RowError):
            yield item.row, ids
        else:
            yield item.row, Question(str(item.extra.get("question_id", item.row)), _task(item), tuple(ids),
                                     item.turns[:config.bench.turns])


def _spread(items: list[PromptRow | RowError], limit: int | None) -> list[PromptRow | RowError]:
    """The first `limit` rows when tasks alternate, and categories within a task, so that few questions represent all of them."""
    if limit is None:
        return items
    tasks: dict[str, dict[str, list[PromptRow | RowError]]] = {}
    for item in items:
        category = "all" if isinstance(item, RowError) else _category(item)
        tasks.setdefault(TASKS.get(category, category), {}).setdefault(category, []).append(item)
    return _in_turn([_in_turn(list(categories.values())) for categories in tasks.values()])[:limit]


def _in_turn(lists: list[list[PromptRow | RowError]]) -> list[PromptRow | RowError]:
    return [item for places in zip_longest(*lists) for item in places if item is not None]


def _category(row: PromptRow) -> str:
    return str(row.extra.get("category", "all"))


def _task(row: PromptRow) -> str:
    return TASKS.get(_category(row), _category(row))


# -- turns -------------------------------------------------------------------------------------------------------------

def turns_of(question: Question) -> range:
    """Indices of its turns, from 0: a single one where the text of further turns is unknown."""
    return range(max(1, len(question.turns)))


def prompt_of(question: Question, answers: Sequence[tuple[int, ...]], base: Base, room: int) -> tuple[int, ...]:
    """Token ids of the turn that follows `answers`, which are plain's answers to the earlier turns: the chat template applied
    to the user's texts and the answers' texts, without the stop token.

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
    """Cache slots, in tokens, that a sequence needs for the longest conversation; at most the base's context limit. The text of
    an answer may be tokenized into more tokens than were generated, so each answer counts twice."""
    longest = max(len(question.prompt_ids) + sum(len(base.encode_prompt(said)) + 2 * max_new_tokens
                                                 for said in question.turns[1:]) for question in questions)
    return min(base.context_limit, longest + max_new_tokens)
