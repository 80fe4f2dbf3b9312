"""Anything as a line of a Batch file, as a request or as an endpoint's answer: rows, named errors, files that read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hydra_core.errors import InputError, StoppedError
from pipelines.batch.backend import RequestSettings, Response
from pipelines.batch.http_backend import HttpBackend
from pipelines.batch.http_client import HttpAnswer
from pipelines.batch.openai_format import generation_of
from pipelines.batch.reader import BadRow, BatchRow, Reading, read_rows
from pipelines.batch.writer import BATCH, BATCH_ERRORS, Output, Writer, deduplicate
from pipelines.config import load_config
from pipelines.serve.messages import Generation
from pipelines.serve.openai.errors import ApiError
from pipelines.serve.openai.requests import IGNORED, UNSUPPORTED, ChatRequest, CompletionRequest

MODEL = "hydra-heads"
TEXTS = st.text(st.characters(codec=None), max_size=8)  # half characters too
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6)
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "system", "assistant", "tool", "king"]) | VALUES, "content": TEXTS | VALUES,
    "name": VALUES, "tool_calls": VALUES}), max_size=3)
FIELDS = {name: VALUES for name in (*UNSUPPORTED, *IGNORED, "n", "seed", "stop", "stream", "stream_options", "temperature",
                                    "top_p", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs",
                                    "presence_penalty", "frequency_penalty", "speculative")}
BODIES = st.fixed_dictionaries({}, optional=FIELDS | {
    "model": st.just(MODEL) | VALUES, "messages": MESSAGES | VALUES, "prompt": TEXTS | VALUES})
LINES = st.one_of(VALUES, st.fixed_dictionaries({}, optional={
    "custom_id": st.sampled_from(["a", "b", "row-1"]) | VALUES, "method": st.just("POST") | VALUES,
    "url": st.sampled_from(["/v1/chat/completions", "/v1/completions"]) | VALUES, "body": BODIES | VALUES}))
ANSWERS = st.one_of(VALUES, st.fixed_dictionaries({}, optional={
    "choices": st.lists(st.fixed_dictionaries({}, optional={
        "message": st.fixed_dictionaries({}, optional={"content": TEXTS | VALUES}) | VALUES, "text": TEXTS | VALUES,
        "finish_reason": st.just("stop") | VALUES}) | VALUES, min_size=1, max_size=2) | VALUES,
    "usage": st.fixed_dictionaries({}, optional={
        "completion_tokens": st.integers(0, 9) | VALUES, "speculative": st.fixed_dictionaries({}, optional={
            "steps": st.integers(0, 9) | VALUES, "tokens_per_step": VALUES}) | VALUES}) | VALUES,
    "model": st.just("m") | VALUES, "system_fingerprint": VALUES, "error": VALUES}))
many = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@many
@given(lines=st.lists(LINES, min_size=1, max_size=6))
def test_any_batch_file(tmp_path_factory: pytest.TempPathFactory, lines: list[Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    good = {"custom_id": "good", "url": "/v1/completions", "body": {"prompt": "x"}}
    path.write_text("".join(json.dumps(line) + "\n" for line in [good, *lines]), encoding="utf-8")
    refused: list[BadRow] = []
    reading = Reading(refused.append)
    todo = list(reading.todo(read_rows(load_config(None, {"batch.input": str(path)})), set()))
    assert len(todo) + len(refused) + reading.skipped == reading.rows == len(lines) + 1 and todo[0].id == "good"
    for row in todo:
        try:
            assert isinstance(generation_of(row, MODEL, 8, 0.0, 0, 8), Generation)
        except ApiError as error:
            json.dumps(error.body(), allow_nan=False).encode()
            assert error.status in (400, 404)
    for bad in refused:
        bad.message.encode()
        assert bad.message.startswith(f"row {bad.row}: ")


@many
@given(body=BODIES, chat=st.booleans())
def test_any_request(body: dict[str, Any], chat: bool) -> None:
    try:
        request = (ChatRequest if chat else CompletionRequest).model_validate(body)
        request.refuse_unsupported()
        if isinstance(request, ChatRequest):
            request.plain_messages()
        found = request.generation("x", 64, 8, 8)
        assert 1 <= found.max_new_tokens <= 64 and 1 <= found.n <= 8 and found.temperature >= 0 and 0 <= found.top_p <= 1
    except ApiError as error:
        assert error.status == 400 and json.dumps(error.body(), allow_nan=False)
    except ValidationError as error:
        assert error.errors()


@many
@given(answer=ANSWERS, status=st.sampled_from([200, 400, 404, 500]), kind=st.sampled_from(["jsonl", "parquet", "openai"]))
def test_any_answer_of_an_endpoint(tmp_path_factory: pytest.TempPathFactory, answer: Any, status: int, kind: str) -> None:
    """It becomes a row or an error row of a file that reads back, and nothing ends the job."""
    raw = json.dumps(answer).encode()
    folder = tmp_path_factory.mktemp("answer")
    row, reply = BatchRow("a", 1, prompt="x"), asked(status, raw)
    writer = Writer(Output(str(folder), kind, "m", 64))
    writer.add(row, reply)
    writer.flush()
    rows = deduplicate(folder / "rows", kind, BATCH)
    errors = deduplicate(folder / "errors", kind, BATCH_ERRORS)
    assert (len(rows.ids), len(errors.ids)) == ((1, 0) if reply.status == 200 else (0, 1))
    assert (status, reply.status == 200) != (400, True) and not list(Path(folder).rglob("*.torn"))


def asked(status: int, raw: bytes) -> Response:
    """What a backend makes of an endpoint that always answers so."""
    backend = HttpBackend(RequestSettings(MODEL, 8, 0.0, 0, address="http://127.0.0.1:9", row_seconds=1.0))
    backend.retry_policy.pause = lambda _: None
    now = iter(range(10**6))
    backend.retry_policy.clock = lambda: float(next(now))
    backend.client.post = lambda *_: HttpAnswer(status, {}, raw)  # type: ignore[method-assign]
    try:
        return backend.ask(BatchRow("a", 1, prompt="x"))
    except StoppedError as error:  # "model not found" for the model that was there
        assert status == 404
        return Response(404, str(error))
    finally:
        backend.stop()


def test_an_input_without_a_line_of_the_format_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"custom_id": "a"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="has no field `prompt`"):
        list(read_rows(load_config(None, {"batch.input": str(tmp_path / "p.jsonl")})))
