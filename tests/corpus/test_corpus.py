"""Every odd input through every door that takes such an input: the same rows, and the same words for what is none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from hydra_core.base import Base
from hydra_core.errors import InputError
from pipelines.batch.openai_format import generation_of
from pipelines.batch.reader import BadRow, BatchRow, read_rows
from pipelines.bench.questions import load_questions
from pipelines.config import RunConfig, load_config
from pipelines.serve.messages import Generation, is_text
from pipelines.serve.openai.errors import ApiError
from tests.corpus.cases import CHATS, FILES, Bad, ChatCase, bodies, user
from tests.pipelines.distill.stand_ins import file_prompts
from tests.pipelines.serve.front import ANSWER, Handle, made_front

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .*__del__")  # Serve's wrapper around a front that no Serve made
MODEL = "hydra-heads"
Door = Callable[["Doors", Path], tuple[list[str], list[str]]]
"""A file -> prompts as the base reads them, and the lines that say why a row is none. Raises InputError for the whole file."""


class Doors:
    """What the doors need: a base and a place for a run."""

    def __init__(self, base: Base, base_dir: Path, root: Path) -> None:
        self.base, self.base_dir, self.root = base, base_dir, root
        self.asked: Callable[[dict[str, Any]], Generation] | None = None

    def config(self, **values: Any) -> RunConfig:
        return load_config(None, {"storage": str(self.root), "base.model": str(self.base_dir), "base.dtype": "fp32", **values})

    def text(self, ids: Any) -> str:
        return self.base.decode(list(ids))

    def chat(self, prompt: str, system: str = "") -> str:
        """The text that a base reads for the words of a user."""
        messages = [{"role": "system", "content": system}] if system else []
        return self.text(self.base.encode_prompt(None, [*messages, user(prompt)]))

    def generation(self, generation: Generation) -> str:
        if not is_text([generation.prompt, generation.messages]):
            raise InputError("half a character")
        return self.text(self.base.encode_prompt(generation.prompt, generation.messages))

    def distill(self, path: Path) -> tuple[list[str], list[str]]:
        rows, errors, _ = file_prompts(path, self.base.tokenizer)
        return [self.text(row["prompt_ids"]) for row in rows], [row["message"] for row in errors]

    def bench(self, path: Path) -> tuple[list[str], list[str]]:
        questions, errors = load_questions(self.config(**{"bench.prompts": str(path)}))
        return [self.text(question.prompt_ids) for question in questions], [row["message"] for row in errors]

    def batch(self, path: Path) -> tuple[list[str], list[str]]:
        prompts, errors = [], []
        for row in read_rows(self.config(**{"batch.input": str(path)})):
            if isinstance(row, BadRow):
                errors.append(row.message)
            else:
                prompts.append(self.generation(generation_of(row, MODEL, 8, 0.0, 0, 8)))
        return prompts, errors


@pytest.fixture
def doors(tiny_base: Base, tiny_base_dir: Path, tmp_path: Path) -> Doors:
    return Doors(tiny_base, tiny_base_dir, tmp_path)


@pytest.mark.parametrize("door", [Doors.distill, Doors.bench, Doors.batch], ids=["distill", "bench", "batch"])
@pytest.mark.parametrize("name", FILES)
def test_files(doors: Doors, tmp_path: Path, name: str, door: Door) -> None:
    case = FILES[name]
    path = tmp_path / case.name
    path.write_bytes(case.content)
    if isinstance(case.rows, Bad):
        with pytest.raises(InputError, match=re.escape(case.rows.words)) as caught:
            door(doors, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value) and is_text(str(caught.value))
        return
    prompts, errors = door(doors, path)
    assert prompts == [doors.chat(row) for row in case.rows if isinstance(row, str)]
    wanted = [row.words for row in case.rows if isinstance(row, Bad)]
    assert len(errors) == len(wanted)
    for error, words in zip(errors, wanted, strict=True):
        assert words in error and re.match(r"row \d+: ", error) and "\n" not in error and is_text(error)


def row_of(case: ChatCase, doors: Doors, path: Path) -> str:
    """A line of a prompt file, through the reader of all stages."""
    path.write_text(json.dumps({"messages": case.messages}) + "\n" + json.dumps({"prompt": "another"}) + "\n", encoding="utf-8")
    first = next(iter(read_rows(doors.config(**{"batch.input": str(path)}))))
    if isinstance(first, BadRow):
        raise InputError(first.message)
    return doors.generation(generation_of(first, MODEL, 8, 0.0, 0, 8))


def line_of(case: ChatCase, doors: Doors, path: Path) -> str:
    """A line of an OpenAI Batch file."""
    body = {"model": MODEL, "messages": case.messages}
    path.write_text(json.dumps({"custom_id": "a", "url": "/v1/chat/completions", "body": body}) + "\n", encoding="utf-8")
    (row,) = read_rows(doors.config(**{"batch.input": str(path)}))
    if isinstance(row, BadRow):
        raise InputError(row.message)
    return doors.generation(_asked(lambda: generation_of(row, MODEL, 8, 0.0, 0, 8)))


def body_of(case: ChatCase, doors: Doors, path: Path) -> str:
    """The body of a request over HTTP."""
    assert doors.asked is not None
    return doors.generation(doors.asked({"model": MODEL, "messages": case.messages}))


@pytest.fixture
def over_http(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Generation]:
    """Sends a body to the front, routes and middleware and all; what it would ask a replica, or InputError with what the client
    is told."""
    handle = Handle([ANSWER])
    client, _ = made_front(monkeypatch, handle, max_new_tokens=64, max_batch_size=8)

    def ask(body: dict[str, Any]) -> Generation:
        answer = client.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
        if answer.status_code != 200:
            assert answer.status_code == 400 and not handle.asked
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
            raise InputError(error["message"])
        return handle.asked[-1]

    return ask


def _asked(make: Callable[[], Generation]) -> Generation:
    try:
        return make()
    except ValidationError as error:
        raise InputError(".".join(map(str, error.errors()[0]["loc"])) + f": {error.errors()[0]['msg']}") from None
    except ApiError as error:
        assert error.status == 400
        raise InputError(error.message) from None


@pytest.mark.parametrize("door", [row_of, line_of, body_of], ids=["row", "Batch line", "HTTP"])
@pytest.mark.parametrize("name", CHATS)
def test_chats(doors: Doors, tmp_path: Path, name: str, door: Callable[[ChatCase, Doors, Path], str],
               over_http: Callable[[dict[str, Any]], Generation]) -> None:
    case, doors.asked = CHATS[name], over_http
    wanted = case.found if door is row_of or case.over_http is None else case.over_http
    if isinstance(wanted, str):
        assert door(case, doors, tmp_path / "p.jsonl") == doors.chat(wanted, case.system)
        return
    with pytest.raises(InputError, match=re.escape(wanted.words)):
        door(case, doors, tmp_path / "p.jsonl")


@pytest.mark.parametrize("door", ["Batch line", "HTTP"])
@pytest.mark.parametrize("name", bodies())
def test_fields_of_a_request(name: str, door: str, over_http: Callable[[dict[str, Any]], Generation]) -> None:
    """A null counts as left out, what has no effect is taken, and what is wrong is named; the same in a Batch file."""
    fields, wanted = bodies()[name]
    body = {"model": MODEL, "messages": [user("hi")], **fields}

    def ask() -> Generation:
        if door == "Batch line":
            return generation_of(BatchRow("a", 1, url="/v1/chat/completions", body=body), MODEL, 8, 0.0, 0, 8)
        return over_http(body)

    if isinstance(wanted, Bad):
        with pytest.raises(InputError, match=re.escape(wanted.words)):
            _asked(ask)
    else:
        found = _asked(ask)
        longest = 8 if door == "Batch line" else 64
        assert (found.max_new_tokens, found.temperature, found.top_p, found.n, found.stop) == (longest, 1.0, 1.0, 1, ())
