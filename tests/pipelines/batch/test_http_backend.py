"""An endpoint that stops, comes back, or is another one then: rows wait, and one output holds the answers of one model."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from hydra_core.errors import InputError, StoppedError
from jobs.runner import run
from pipelines.batch import http_client, retry
from pipelines.batch import stage as batch_stage
from pipelines.batch import writer as batch_writer
from pipelines.batch.backend import RequestSettings
from pipelines.batch.backends import open_backend
from pipelines.batch.http_backend import seconds_of
from pipelines.batch.http_client import proxy_of
from pipelines.batch.reader import BatchRow
from pipelines.batch.stage import run_batch
from pipelines.batch.writer import read_batch_rows
from pipelines.config import RunConfig, load_config
from pipelines.profiling import weight_format
from pipelines.serve.model_identity import ModelDigest
from pipelines.serve.openai.errors import too_slow
from tests.pipelines.batch.stand_in import A_WITH_HEADS, GONE, A, B, StandIn

ROWS, BEFORE = 40, 12
"""Rows of a job, and requests that are answered before the endpoint stops."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.01)
    with StandIn() as found:
        yield found


@pytest.fixture
def make(storage: Path, tmp_path: Path, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(ROWS)), encoding="utf-8")

    def config(**changes: Any) -> RunConfig:
        values = {"storage": str(storage), "batch.input": str(path), "batch.output": str(tmp_path / "out"),
                  "batch.address": server.address, "batch.rows_per_file": 4, "batch.concurrency": 3}
        return load_config(None, values | {name.replace("__", "."): value for name, value in changes.items()})

    return config


def stop_and_come_back(server: StandIn, change: Callable[[StandIn], None]) -> list[int]:
    """At request `BEFORE` the endpoint stops: a few 404s of the proxy, then nothing, then it is what `change` makes of it. The
    number of requests that the proxy answered."""
    told: list[int] = []
    once = threading.Lock()  # several requests come at a time: one of them ends the endpoint

    def instead(number: int, body: dict[str, Any]) -> tuple[int, str, bytes] | None:
        if number <= BEFORE:
            return None
        told.append(number)
        if len(told) >= 6 and once.acquire(blocking=False):
            threading.Thread(target=away).start()
        return GONE

    def away() -> None:
        server.kill()
        server.instead = lambda *_: None
        change(server)
        threading.Event().wait(0.3)
        server.start()

    server.instead = instead
    return told


def texts(folder: Path) -> dict[int, str]:
    found = list(read_batch_rows(folder / "rows", "jsonl"))
    assert len({row["id"] for row in found}) == len(found)
    return {row["row"]: row["text"] for row in found}


@pytest.mark.parametrize("end", ["/", "/v1", "/v1/"])
def test_an_address_as_openais_clients_have_it(make: Callable[..., RunConfig], server: StandIn, end: str) -> None:
    assert run_batch(make(batch__address=server.address + end)).figures["rows"] == len(server.asked) == ROWS


@pytest.mark.parametrize("back", [A, A_WITH_HEADS], ids=["the same", "other heads"])
def test_while_an_endpoint_is_away_rows_wait(make: Callable[..., RunConfig], server: StandIn, back: ModelDigest) -> None:
    """Serve's own 404 and refused connections are no answer to a row. Other heads on the same base give the same answers."""
    told = stop_and_come_back(server, lambda it: it.become(back))
    result = run_batch(make())
    assert (result.figures["rows"], result.figures["errors"]) == (ROWS, 0) and len(told) >= 6
    assert texts(Path(result.outputs["rows"]).parent) == {n + 1: f"{A.base}: question {n}" for n in range(ROWS)}
    assert result.figures["model"] == A.base
    assert result.figures["made_by"] == ", ".join(sorted({A.fingerprint, back.fingerprint}))


def another_name(server: StandIn) -> None:
    server.name = "something-else"


def no_fingerprint(server: StandIn) -> None:
    server.fingerprint = None


@pytest.mark.parametrize(("change", "told"), [
    (lambda it: it.become(B), f"answers with another model now ({B.fingerprint}; the job began with {A.fingerprint})"),
    (no_fingerprint, "answers with another model now (no fingerprint"),
    (another_name, "does not serve 'hydra-heads' any more")], ids=["base", "unknown", "name"])
def test_another_model_ends_the_job(make: Callable[..., RunConfig], server: StandIn, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                    change: Callable[[StandIn], None], told: str) -> None:
    """With one line; nothing of the other model is written, and the job goes on when the first one is back."""
    stop_and_come_back(server, change)
    config = make()
    argv = [f"{name}={value}" for name, value in (
        ("storage", config.storage), ("batch.input", config.batch.input), ("batch.output", config.batch.output),
        ("batch.address", server.address), ("batch.rows_per_file", 4), ("batch.concurrency", 3))]
    monkeypatch.setattr(weight_format, "resolve_format", None)  # the endpoint has its base: none is looked at here
    assert run("batch", argv) == 1
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert last.startswith(f"error: batch.address={server.address}: ") and told in last and "Traceback" not in said.err
    assert not said.out and not (tmp_path / "out" / "manifest.json").exists()
    kept = texts(tmp_path / "out")
    assert 0 < len(kept) <= BEFORE and all(text == f"{A.base}: question {row - 1}" for row, text in kept.items())
    server.become(A)
    server.name = "hydra-heads"
    assert run("batch", argv) == 0
    assert texts(tmp_path / "out") == {n + 1: f"{A.base}: question {n}" for n in range(ROWS)}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["resumed"] == len(kept)


def test_an_endpoint_of_another_kind_is_held_to_its_first_answer(make: Callable[..., RunConfig], server: StandIn) -> None:
    """In a later run too; `batch.any_model` takes every answer, and the report says who gave them."""
    server.ours = False

    def drift(number: int, body: dict[str, Any]) -> None:
        server.fingerprint = "fp_1" if number <= BEFORE else "fp_2"

    server.instead = drift  # type: ignore[assignment]
    for _ in range(2):
        with pytest.raises(StoppedError, match="as hydra-heads fp_2 now, and its first answer came from hydra-heads fp_1"):
            run_batch(make())
    assert 0 < len(texts(Path(str(make().batch.output)))) <= BEFORE
    result = run_batch(make(batch__any_model=True))
    assert (result.figures["rows"], result.figures["errors"]) == (ROWS, 0)
    assert result.figures["made_by"] == "hydra-heads fp_2"


def test_an_endpoint_of_an_earlier_version_is_no_other_model(make: Callable[..., RunConfig], server: StandIn) -> None:
    """It tells its base, and its answers do not say what made them: they are held to the first one."""
    server.earlier, server.fingerprint = True, None
    result = run_batch(make())
    assert (result.figures["rows"], result.figures["made_by"], result.figures["model"]) == (ROWS, "hydra-heads", A.base)


def test_a_part_that_comes_late_is_set_aside(make: Callable[..., RunConfig], tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """A killed job's last part may be written after the next job has finished: the rows would be there twice."""
    run_batch(make())
    folder = tmp_path / "out" / "rows"
    late = folder / f"part-{'0' * 32}.jsonl"
    late.write_bytes(next(folder.glob("part-*")).read_bytes())
    assert run_batch(make()).skipped and len(texts(tmp_path / "out")) == ROWS
    assert not late.exists() and (folder / f".{late.name}.late").exists()
    assert f"{late} was written after the job had ended" in capsys.readouterr().err


def test_a_part_that_comes_after_the_count_is_none_of_the_output(make: Callable[..., RunConfig], tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the count of the rows and the manifest too, which lists what was counted."""
    folder = tmp_path / "out" / "rows"
    late, then = folder / f"part-{'0' * 32}.jsonl", batch_stage.report

    def meanwhile(*given: Any) -> Any:
        late.write_bytes(next(folder.glob("part-*")).read_bytes())
        return then(*given)

    monkeypatch.setattr(batch_stage, "report", meanwhile)
    assert run_batch(make()).figures["rows"] == ROWS
    assert run_batch(make()).skipped and len(texts(tmp_path / "out")) == ROWS


def test_a_disk_that_is_full_for_a_while_costs_no_row(make: Callable[..., RunConfig], tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends, what was written stays, and the next run asks for the rest alone."""
    write, left = batch_writer._write_rows, [4]

    def full(*given: Any) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*given)

    monkeypatch.setattr(batch_writer, "_write_rows", full)
    with pytest.raises(OSError, match="No space left"):
        run_batch(make())
    kept = texts(tmp_path / "out")
    assert len(kept) == 16
    monkeypatch.setattr(batch_writer, "_write_rows", write)
    result = run_batch(make())
    assert result.figures["resumed"] == 16 and texts(tmp_path / "out").keys() == set(range(1, ROWS + 1))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_part_that_the_disk_does_not_give_is_not_torn(make: Callable[..., RunConfig], tmp_path: Path, kind: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are there, and would be asked for again."""
    run_batch(make(batch__format=kind))
    (tmp_path / "out" / "manifest.json").unlink()
    before = sorted(path.name for path in (tmp_path / "out" / "rows").iterdir())

    def unreadable(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(StoppedError, match=r"part-.* cannot be read now .*Input/output error"):
        patched.setattr(batch_writer, "_read", unreadable)
        run_batch(make(batch__format=kind))
    assert sorted(path.name for path in (tmp_path / "out" / "rows").iterdir()) == before
    assert run_batch(make(batch__format=kind)).figures["resumed"] == ROWS


def test_connections_are_reused(make: Callable[..., RunConfig], server: StandIn) -> None:
    run_batch(make())
    assert len(server.asked) == ROWS and server.connections <= 3 + 2  # three in flight, and those that looked first


def test_a_name_that_is_not_served_is_told_before_anything(make: Callable[..., RunConfig], server: StandIn) -> None:
    with pytest.raises(InputError, match=r"does not serve 'mine', only hydra-heads: set serve\.app_name"):
        run_batch(make(serve__app_name="mine"))
    server.kill()
    with pytest.raises(StoppedError, match="no endpoint answers there"):
        run_batch(make())


def bodies(path: Path, names: list[str | None]) -> str:
    path.write_text("".join(json.dumps({
        "custom_id": f"r{number}", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": None, "seed": None}}) + "\n"
        for number, name in enumerate(names)), encoding="utf-8")
    return str(path)


def test_a_batch_file_for_another_model(make: Callable[..., RunConfig], server: StandIn, tmp_path: Path,
                                        tiny_base_dir: Path) -> None:
    """Most rows: one line that names both, and the setting, before a row is sent. A few: error rows. A null: the default."""
    path = bodies(tmp_path / "all.jsonl", ["gpt-4o-mini"] * 30)
    for way in ({}, {"batch__address": None, "serve__model": "plain", "base__dtype": "fp32",
                    "base__model": str(tiny_base_dir)}):
        with pytest.raises(InputError, match=r"30 of its 30 rows ask .* \('gpt-4o-mini'\) than 'hydra-heads'") as told:
            run_batch(make(batch__input=path, **way))
        assert "serve.app_name" in str(told.value) and not server.asked
    result = run_batch(make(batch__input=bodies(tmp_path / "few.jsonl", ["gpt-4o-mini", *[None] * 29])))
    assert (result.figures["rows"], result.figures["errors_refused"]) == (29, 1)
    (seed,) = {type(body["seed"]) for body in server.asked}
    assert seed is int and {body["max_tokens"] for body in server.asked} == {64}


@pytest.fixture
def ask(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setenv("BATCH_TEST_KEY", "secret")

    def one(**settings: Any) -> Any:
        backend = open_backend(RequestSettings("hydra-heads", 8, 0.0, 0, address=server.address, key_variable="BATCH_TEST_KEY",
                                               **settings))
        backend.retry_policy.pause = lambda _: None
        backend.retry_policy.clock = lambda: 0.0  # what a loaded machine takes decides nothing
        try:
            return backend.ask(BatchRow("a", 1, prompt="x"))
        finally:
            backend.stop()

    return one


def answer(**changes: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}],
                       "usage": {"completion_tokens": 2}} | changes).encode()


@pytest.mark.parametrize(("raw", "word"), [
    (answer(usage=[1]), "usage"), (answer(usage={"completion_tokens": "2"}), "usage.completion_tokens"),
    (answer(usage={"completion_tokens": 2**31}), "usage.completion_tokens"),
    (answer(usage={"completion_tokens": True}), "usage.completion_tokens"),
    (answer(usage={"speculative": 3}), "usage.speculative"), (answer(choices=[]), "choices"),
    (answer(choices=["x"]), "choices.0"),
    (answer(choices=[{}]), "neither message nor text"), (answer(choices=[{"message": {"content": ["x"]}}]), "content"),
    (answer(choices=[{"text": "\ud800"}]), "choices"), (answer().replace(b'"x"', b"NaN"), "choices"),
    (answer().replace(b'"x"', b"1e999"), "1e999"),
    (b"[" * 5000, "[[["),
    (b"<html>", "<html>"), (b"", "without a body")])
def test_an_answer_that_is_none_is_a_failed_row(ask: Callable[..., Any], server: StandIn, raw: bytes, word: str) -> None:
    """Ill-typed fields and half characters from an endpoint neither end the job nor reach a file."""
    server.instead = lambda *_: (200, "application/json", raw)
    reply = ask()
    assert 500 <= reply.status < 600 and word in reply.message and not reply.columns
    json.dumps(reply.body, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("raw", [answer(usage=None), answer(usage={"completion_tokens": None}), answer(model=None),
                                 answer(choices=[{"message": {"content": None}, "finish_reason": None}]),
                                 answer(choices=[{"text": "", "finish_reason": "length", "logprobs": {}}])])
def test_what_an_answer_may_leave_out(ask: Callable[..., Any], server: StandIn, raw: bytes) -> None:
    server.instead = lambda *_: (200, "application/json", raw)
    assert ask().status == 200


@pytest.mark.parametrize("status", [408, 425, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529])
def test_while_a_server_in_front_finds_nobody_rows_wait(ask: Callable[..., Any], server: StandIn, status: int) -> None:
    """However often it says so: no row is at fault."""
    server.instead = lambda number, _: (status, "text/html", b"<html>origin is down") if number < 9 else None
    assert ask().status == 200 and len(server.asked) == 9


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that were sent, whether or not the server has read them."""
    sent: list[str] = []
    post = http_client.HttpClient.post

    def counted(client: http_client.HttpClient, path: str, body: dict[str, Any], seconds: float) -> http_client.HttpAnswer:
        sent.append(path)
        return post(client, path, body, seconds)

    monkeypatch.setattr(http_client.HttpClient, "post", counted)
    return sent


def test_a_row_that_hangs_is_an_error_in_the_end(ask: Callable[..., Any], server: StandIn, attempts: list[str]) -> None:
    hang = threading.Event()

    def instead(number: int, body: dict[str, Any]) -> None:
        hang.wait(20)

    server.instead = instead  # type: ignore[assignment]
    try:
        reply = ask(row_seconds=0.2)
    finally:
        hang.set()
    assert reply.status == 504 and "no end in 0.2 s" in reply.message and len(attempts) == 3


def test_an_answer_that_takes_our_endpoint_too_long_is_the_rows_fault(ask: Callable[..., Any], server: StandIn,
                                                                      attempts: list[str]) -> None:
    """Its 504 is no full queue, for which a row would wait half an hour; that of a proxy in front is."""
    slow = json.dumps(too_slow(3.0).body()).encode()
    server.instead = lambda *_: (504, "application/json", slow)
    reply = ask()
    assert reply.status == 504 and "within the 3 seconds" in reply.message and len(attempts) == 3
    assert "serve.request_seconds" in reply.message and "batch.row_seconds" not in reply.message
    for raw in (b"<html>gateway timeout", b'{"error": {"message": "x", "code": null}}', b'{"error": "timeout"}', b"[1]"):
        left = len(attempts) + 5
        server.instead = lambda *_: (504, "text/html", raw) if len(attempts) < left else None  # noqa: B023
        assert ask().status == 200 and len(attempts) == left


def test_the_key_goes_to_no_other_place(ask: Callable[..., Any], server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect is not followed, and no proxy of the environment stands between this machine and itself."""
    with StandIn() as other:
        server.instead = lambda number, _: (307, "text/plain", f"{other.address}/v1".encode()) if number < 3 else None
        monkeypatch.setenv("http_proxy", other.address)
        assert ask().status == 200
        assert [headers["Authorization"] for headers in server.headers] == ["Bearer secret"] * 3
        assert not other.asked and other.connections == 0
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert proxy_of("https://api.example/x") == "http://proxy:3128"
    monkeypatch.setenv("https_proxy", "proxy:3128")
    assert proxy_of("https://api.example/x") == "http://proxy:3128"
    for host in ("127.0.0.1", "[::1]", "localhost", "127.9.9.9", "inside.example"):
        assert proxy_of(f"https://{host}:8000") is None


def test_a_key_that_is_refused_ends_the_job(ask: Callable[..., Any], server: StandIn) -> None:
    server.instead = lambda *_: (401, "application/json", b'{"error": {"message": "no such key"}}')
    with pytest.raises(StoppedError, match=r"refuses the key now \(no such key\): set batch.key_variable"):
        ask()


def test_an_answer_without_end_is_none(ask: Callable[..., Any], server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "LONGEST_ANSWER", 1 << 20)
    server.instead = lambda *_: (200, "application/json", b" " * (2 << 20))
    assert "longer than 1 MiB" in ask().message


def test_how_long_to_stay_away() -> None:
    assert [seconds_of(text) for text in ("7", "0", None, "²", "-1", "soon", "")] == [7.0, 0.0, None, None, None, None, None]
    assert 50 < (seconds_of(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    assert seconds_of(formatdate(0)) == 0.0
