"""Offline generation through the Serve handle: every row exactly once, whatever dies."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient
from ray import serve

from hydra_core.base import Base
from hydra_core.decoding import DecodingConfiguration, naive_generate, save_configuration
from hydra_core.errors import InputError, StoppedError
from hydra_core.sampling import Request
from jobs.cli import main
from pipelines.batch.stage import batch_finished, run_batch
from pipelines.batch.writer import parts, read_batch_rows
from pipelines.config import RunConfig, load_config
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.lock import only_run
from pipelines.serve.stage import start_app
from pipelines.tracking import Tracker, register
from tests.pipelines.serve.test_stage import free_port
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow


def config_for(storage: Path, base: Path, **changes: object) -> RunConfig:
    values: dict[str, object] = {
        "storage": str(storage), "base.model": str(base), "base.dtype": "fp32", "serve.model": "plain",
        "serve.port": free_port(), "serve.workers.threads": 1, "batch.max_new_tokens": 12}
    return load_config(None, values | {key.replace("__", "."): value for key, value in changes.items()})


def write_rows(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(count)), encoding="utf-8")
    return path


@pytest.mark.parametrize(("kind", "engine"), [("jsonl", "serve"), ("parquet", "embedded")])
def test_rows_errors_and_report(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path, kind: str,
                                engine: str) -> None:
    path = write_rows(storage.parent / "in.jsonl", 20)
    with path.open("ab") as handle:
        handle.write(b'{"x": 1}\n\xff\n' + json.dumps({"prompt": "long " * 100}).encode() + b'\n{"prompt": "a", "id": "k"}\n'
                     + b'{"prompt": "b", "id": "k"}\n{"prompt": "half a pair: \\ud800"}\n{"prompt": "c", "id": "\\udfff"}\n'
                     + b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n{"prompt": "a", "id": "k"}\n')
    config = config_for(storage, tiny_base_dir, batch__input=str(path), batch__format=kind, batch__max_error_share=0.5,
                        batch__rows_per_file=8, batch__engine=engine)
    result = run_batch(config)
    rows = list(read_batch_rows(Path(result.outputs["rows"]), kind))
    assert len(rows) == 21 == len({row["id"] for row in rows})
    assert (result.figures["rows"], result.figures["errors"], result.figures["rows_skipped"]) == (21, 7, 1)
    for row in rows:
        if row["row"] <= 20:
            prompt = tuple(tiny_base.encode_prompt(f"question {row['row'] - 1}"))
            wanted = naive_generate(tiny_base, Request("x", prompt, 12))
            assert tuple(row["token_ids"]) == wanted.token_ids and row["text"] == tiny_base.decode(wanted.token_ids)
            assert row["finish_reason"] == wanted.finish_reason and row["latency_seconds"] > 0
    errors = list(read_batch_errors(Path(result.outputs["errors"]), kind))
    assert (result.figures["errors_input"], result.figures["errors_refused"]) == (6, 1)
    assert sorted(row["message"].split(":")[0] for row in errors) == [
        "prompt", "row 21", "row 22", "row 25", "row 26", "row 27", "row 28"]
    assert any("row 25: id 'k' belongs to row 24 already" in row["message"] for row in errors)  # row 29 repeats row 24 whole
    assert not serve.status().applications  # nothing is left running
    assert run_batch(config).skipped and batch_finished(config)
    with pytest.raises(InputError, match="another run"):
        run_batch(config_for(storage, tiny_base_dir, batch__input=str(path), batch__max_new_tokens=5))


def test_done_means_the_same_answers(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    path = write_rows(storage.parent / "in.jsonl", 3)
    make: Callable[..., RunConfig] = lambda **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, **{"batch.engine": "embedded", "batch.input": str(path), "batch.max_new_tokens": 4, **changes})
    assert not batch_finished(make())
    run_batch(make())
    copied = path.rename(storage.parent / "moved.jsonl")
    for same in ({"batch.engine": "serve"}, {"batch.format": "jsonl"},
                 {"batch.concurrency": 2}, {"batch.rows_per_file": 1}, {"batch.max_error_share": 1}, {"serve.port": 0},
                 {"base.context_limit": 256}, {}):
        assert batch_finished(make(**{**same, "batch.input": str(copied)})), same
    for other in ({"base.dtype": "bf16"}, {"base.context_limit": 100}, {"base.model": str(save_tiny(storage / "b", seed=1))},
                  {"batch.temperature": 1.0}, {"batch.limit": 2}, {"batch.format": "parquet"}):
        config = make(**{"batch.input": str(copied), **other})
        assert not batch_finished(config), other
        with pytest.raises(InputError, match="another run"):
            run_batch(config)


def test_a_new_champion_is_the_same_work(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Its heads change no answer."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = config_for(storage, tiny_base_dir, batch__input=str(write_rows(storage.parent / "in.jsonl", 3)),
                        batch__engine="embedded", serve__model=None)
    with pytest.raises(InputError, match="run `hydra-heads promote`"):
        batch_finished(config)

    def promote(name: str, drafter: Literal["plain", "ngram"]) -> None:
        folder = storage / name
        save_configuration(folder, DecodingConfiguration(drafter, drafter, tiny_base.identity))
        with Tracker.open(config).start("promote") as run:
            run.log_artifact(folder, "configuration")
            register(config, "hydra-heads", run, "configuration", "champion", {})

    promote("first", "plain")
    result = run_batch(config)
    assert result.figures["model"] == "models:/hydra-heads/1" and batch_finished(config)
    params = MlflowClient(Tracker.open(config).uri).get_run(result.run_id).data.params
    assert params["base.model"] == str(tiny_base_dir) and params["batch.max_new_tokens"] == "12"
    promote("the same again", "plain")
    assert batch_finished(config)
    promote("second", "ngram")
    assert batch_finished(config) and run_batch(config).skipped


def test_an_application_that_runs_is_used_if_it_gives_the_answers_asked_for(local_ray: None, tiny_base_dir: Path,
                                                                            storage: Path) -> None:
    path = write_rows(storage.parent / "in.jsonl", 3)
    make: Callable[..., RunConfig] = lambda **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__max_new_tokens=4, **changes)
    app = start_app(make())
    try:
        result = run_batch(make(batch__output=str(storage / "used")))
        assert result.figures["rows"] == 3 and serve.status().applications["hydra-heads"].status == "RUNNING"
        with pytest.raises(InputError, match=r"runs plain \(base .*:fp32, .*but plain \(base .*:bf16, .*is asked for") as caught:
            run_batch(make(batch__output=str(storage / "other"), base__dtype="bf16"))
        assert "\n" not in str(caught.value)
        with pytest.raises(InputError, match=r"context 256, .*context 100, "):
            run_batch(make(batch__output=str(storage / "shorter"), base__context_limit=100))
        assert serve.status().applications["hydra-heads"].status == "RUNNING"
    finally:
        app.stop()


def test_parquet_input(local_ray: None, tiny_base_dir: Path, tiny_base: Base, storage: Path) -> None:
    path = storage.parent / "in.parquet"
    chat = [{"role": "user", "content": "question 2"}]
    pq.write_table(pa.table({
        "id": ["a", "b", "c", "d"], "prompt": ["question 0", "question 1", None, None],
        "messages": pa.array([None, None, chat, None], pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    }), path)
    with pytest.raises(InputError, match=r"1 of 4 rows failed, over the allowed share 0\.05"):
        run_batch(config_for(storage, tiny_base_dir, batch__input=str(path), batch__engine="embedded"))
    told = json.loads((RunPaths.of(config_for(storage, tiny_base_dir)).stage("batch") / "report.json").read_text())
    assert (told["rows"], told["errors"]) == (3, 1)  # what went wrong is told when it is most wanted
    result = run_batch(config_for(storage, tiny_base_dir, batch__input=str(path), batch__max_error_share=0.5,
                                  batch__engine="embedded"))
    client = MlflowClient(Tracker.open(config_for(storage, tiny_base_dir)).uri)
    assert "report.json" in [entry.path for entry in client.list_artifacts(str(result.run_id))]
    assert client.get_run(str(result.run_id)).data.metrics["rows"] == 3
    rows = {row["id"]: row for row in read_batch_rows(Path(result.outputs["rows"]), "parquet")}
    assert (set(rows), result.figures["errors"]) == ({"a", "b", "c"}, 1)
    for number, row in enumerate(rows[name] for name in "abc"):
        prompt = tuple(tiny_base.encode_prompt(f"question {number}"))
        assert tuple(row["token_ids"]) == naive_generate(tiny_base, Request("x", prompt, 12)).token_ids


def test_a_dead_tracking_server_leaves_no_claim(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    config = config_for(storage, tiny_base_dir, batch__input=str(write_rows(storage.parent / "in.jsonl", 3)),
                        tracking__uri="http://127.0.0.1:9")
    with pytest.raises(StoppedError, match=r"tracking\.uri=http://127\.0\.0\.1:9"):
        run_batch(config)
    assert not (storage / "runs" / "default" / "batch").exists()


def test_bad_input(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    storage.mkdir()
    empty, wrong = storage / "empty.jsonl", storage / "wrong.jsonl"
    empty.write_text("", encoding="utf-8")
    wrong.write_text('{"text": "x"}\n', encoding="utf-8")
    for path, word in ((empty, "empty"), (wrong, "no field `prompt`"), (storage / "none.jsonl", "no such file")):
        with pytest.raises(InputError, match=word):
            run_batch(config_for(storage, tiny_base_dir, batch__input=str(path)))
    assert not (storage / "runs" / "default" / "batch").exists()


def read_batch_errors(folder: Path, kind: str) -> list[dict[str, object]]:
    if kind == "parquet":
        return [row for part in parts(folder, kind) for row in pq.read_table(part).to_pylist()]
    return [json.loads(line) for part in parts(folder, kind) for line in part.open(encoding="utf-8")]


def write_requests(path: Path, count: int) -> Path:
    def request(i: int) -> dict[str, object]:
        body = {"model": "hydra-heads", "temperature": i % 2} | ({"max_tokens": 9} if i % 4 else {})
        if i % 3:
            return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": f"raw {i}"}}
        chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": f"question {i}"}]
        return {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "messages": chat}}

    bad = [{"custom_id": "other", "method": "POST", "url": "/v1/completions", "body": {"model": "gpt", "prompt": "x"}},
           {"custom_id": "no-url", "method": "POST", "url": "/v1/embeddings", "body": {}}]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*map(request, range(count)), *bad, request(0)]), encoding="utf-8")
    return path


def test_openai_batch_through_handle_http_and_embedded_engine(local_ray: None, tiny_base_dir: Path, storage: Path) -> None:
    path = write_requests(storage.parent / "in.jsonl", 9)
    make: Callable[..., RunConfig] = lambda name, **changes: config_for(  # noqa: E731
        storage, tiny_base_dir, batch__input=str(path), batch__max_error_share=0.5, batch__output=str(storage / name), **changes)
    app = start_app(make("x"))
    try:
        results = [run_batch(make("handle")), run_batch(make("http", batch__address=app.url))]
    finally:
        app.stop()
    results.append(run_batch(make("embedded", batch__engine="embedded")))
    texts = []
    for result in results:
        lines = read_batch_errors(Path(result.outputs["rows"]), "openai")
        assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
        bodies = {str(line["custom_id"]): line["response"]["body"] for line in lines}  # type: ignore[index]
        texts.append({name: (body["choices"][0].get("text") or body["choices"][0]["message"]["content"],
                             body["usage"]["completion_tokens"]) for name, body in bodies.items()})
        assert (result.figures["rows"], result.figures["errors"], result.figures["rows_skipped"]) == (9, 2, 1)
        assert {line["custom_id"] for line in read_batch_errors(Path(result.outputs["errors"]), "openai")} == {"other", "no-url"}
        assert result.figures["errors_input"] == result.figures["errors_refused"] == 1 and result.figures["tokens"] > 0
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 9


def test_partitions_are_runs_of_their_own(local_ray: None, tiny_base_dir: Path, storage: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    for day in ("2026-01-30", "2026-01-31"):
        write_rows(storage.parent / f"{day}.jsonl", 2 if day.endswith("30") else 3)

    def run(day: str) -> int:
        config = config_for(storage, tiny_base_dir, batch__engine="embedded", batch__max_new_tokens=4, batch__partition=day,
                            batch__input=str(storage.parent / "{partition}.jsonl"),
                            batch__output=str(storage.parent / "out" / "{partition}"))
        return int(run_batch(config).figures["rows"])

    assert (run("2026-01-30"), run("2026-01-31")) == (2, 3)
    folder = storage.parent / "out" / "2026-01-31"
    marker, manifest = (folder / "_SUCCESS").stat(), (folder / "manifest.json").stat()
    assert marker.st_mtime_ns >= manifest.st_mtime_ns
    capsys.readouterr()
    (folder / "_SUCCESS").unlink()  # as if killed just before
    assert run("2026-01-31") == 3 and (folder / "_SUCCESS").exists()
    assert f"{folder} is finished already, with 3 rows: nothing to do" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        run("2026-02-01")
    with only_run(folder.parent / "2026-01-30", storage):
        assert run("2026-01-30") == 2  # what is finished needs no lock
        (folder.parent / "2026-01-30" / "manifest.json").unlink()
        with pytest.raises(InputError, match=rf"2026-01-30: another run writes to it \(process {os.getpid()} "):
            run("2026-01-30")
    assert run("2026-01-30") == 2


def test_the_command_says_who_is_at_the_same_day(tiny_base_dir: Path, storage: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(storage.parent / "2026-01-31.jsonl", 2)
    out = storage.parent / "out"
    with only_run(out / "2026-01-31", storage):
        status = main(["batch", f"storage={storage}", f"base.model={tiny_base_dir}", "base.dtype=fp32", "serve.model=plain",
                       "batch.engine=embedded", "batch.partition=2026-01-31", f"batch.input={storage.parent}/{{partition}}.jsonl",
                       f"batch.output={out}/{{partition}}"])
    told = capsys.readouterr()
    assert status == 2 and not told.out
    assert told.err.strip().splitlines()[-1].startswith("error: ") and f"(process {os.getpid()} on " in told.err
    assert "Traceback" not in told.err
