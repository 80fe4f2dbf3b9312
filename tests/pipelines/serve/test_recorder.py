"""What is kept of answers: the chosen ones, within bounds, redacted or not at all, and never in the way."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_core.decoding import Result
from hydra_core.errors import InputError
from hydra_core.storage import as_path
from pipelines.config import load_config
from pipelines.rows.prompt_reader import RowError
from pipelines.rows.served_records import ServedRecord, prune, read_records, record_parts, write_records
from pipelines.runtime.artifacts import served_folder
from pipelines.serve import recorder as module
from pipelines.serve.messages import Generation
from pipelines.serve.recorder import Recorder, Recording, record_of

HOOKS = "tests.pipelines.serve.hooks"
RECORD = ServedRecord(1000.0, (3, 4), (7, 8, 9), "stop", 0.0, 0, {}, (1, 0), "tiny@00:fp32", "plain")


def kept(folder: Path) -> list[ServedRecord]:
    found = [record for path, _ in record_parts(folder) for record in read_records(path)]
    assert all(isinstance(record, ServedRecord) for record in found)
    return found  # type: ignore[return-value]


class Recorded:
    """A recorder and the fates that it tells."""

    def __init__(self, folder: Path | str, **changes: Any) -> None:
        values: dict[str, Any] = dict(folder=str(folder), share=1.0, max_bytes=2**20, max_age_days=1.0, rows_per_file=2,
                                      seconds=60.0)
        self.fates: Counter[str] = Counter()
        self.it = Recorder(Recording(**values | changes), lambda ids: f"<{','.join(map(str, ids))}>", self.tell)

    def tell(self, fate: str, count: int) -> None:
        self.fates[fate] += count


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        if time.monotonic() > end:
            pytest.fail("it does not happen")
        time.sleep(0.01)


def test_whole_parts_at_once_and_the_rest_at_the_end(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "a" / "served")
    for number in range(5):
        recorded.it.offer(replace(RECORD, time=float(number)))
    recorded.it.close()
    recorded.it.offer(RECORD)  # too late, and no error
    recorded.it.close()
    assert sorted(record.time for record in kept(tmp_path / "a" / "served")) == [0, 1, 2, 3, 4]
    assert recorded.fates == {"written": 5} and len(record_parts(tmp_path / "a" / "served")) == 3


def test_few_answers_are_written_after_a_while(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, seconds=0.05, rows_per_file=1000)
    recorded.it.offer(RECORD)
    until(lambda: recorded.fates == {"written": 1})
    assert kept(tmp_path) == [RECORD]


def test_a_full_queue_drops_and_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(module, "WAITING", 3)
    monkeypatch.setattr(module, "write_records", lambda *_: gate.wait(30))
    recorded = Recorded(tmp_path, rows_per_file=1)
    recorded.it.offer(RECORD)
    until(lambda: recorded.it._queue.empty())  # the thread waits for its disk
    for _ in range(5):
        recorded.it.offer(RECORD)
    assert recorded.fates == {"queue_full": 2}
    gate.set()
    recorded.it.close()
    assert recorded.fates == {"queue_full": 2, "written": 4}


def test_a_folder_that_takes_nothing_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    recorded = Recorded(tmp_path / "file" / "served", rows_per_file=1)
    caplog.set_level("INFO", "ray.serve")
    for _ in range(3):
        recorded.it.offer(RECORD)
    until(lambda: recorded.fates["not_writable"] == 3)
    (tmp_path / "file").unlink()
    recorded.it.offer(RECORD)
    recorded.it.close()
    assert recorded.fates == {"not_writable": 3, "written": 1}
    assert ["dropped" in line.message for line in caplog.records] == [True, False] and "again" in caplog.records[1].message


def test_records_in_an_object_store(s3: str, caplog: pytest.LogCaptureFixture) -> None:
    """Parts appear, the oldest go, and a bucket that is missing at first drops what was to be written, in one line."""
    import s3fs

    folder = as_path(f"{s3}/served")
    recorded = Recorded(f"{s3}/served", rows_per_file=1)
    for number in range(3):
        recorded.it.offer(replace(RECORD, time=float(number)))
    recorded.it.close()
    assert sorted(record.time for record in kept(folder)) == [0, 1, 2] and recorded.fates == {"written": 3}
    newest, size = record_parts(folder)[-1]
    small = Recorded(f"{s3}/served", rows_per_file=1, max_bytes=2 * size + 10)
    small.it.offer(RECORD)
    small.it.close()
    assert len(parts := record_parts(folder)) == 2 and parts[0][0] == newest
    caplog.set_level("INFO", "ray.serve")
    missing = Recorded(f"{s3}-later/served", rows_per_file=1)
    missing.it.offer(RECORD)
    until(lambda: missing.fates["not_writable"] == 1)
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(f"{s3}-later")
    missing.it.offer(RECORD)
    missing.it.close()
    assert missing.fates == {"not_writable": 1, "written": 1} and kept(as_path(f"{s3}-later/served")) == [RECORD]
    assert ["dropped" in line.message for line in caplog.records if line.name == "ray.serve"] == [True, False]


def test_the_oldest_parts_go(tmp_path: Path) -> None:
    paths = [write_records(tmp_path, [replace(RECORD, time=float(at))], float(at), "w") for at in (1000, 2000, 3000, 4000)]
    size = paths[0].stat().st_size
    assert prune(tmp_path, 100 * size, 1500.0) == 1 and [path for path, _ in record_parts(tmp_path)] == paths[1:]
    assert prune(tmp_path, 2 * size, 0.0) == 1 and [path for path, _ in record_parts(tmp_path)] == paths[2:]
    assert prune(tmp_path, 2 * size, 0.0) == 0
    recorded = Recorded(tmp_path, max_bytes=1, rows_per_file=1)
    recorded.it.offer(RECORD)
    recorded.it.close()
    assert record_parts(tmp_path) == []  # a limit below one part keeps nothing


def test_a_part_that_was_cut_off_is_read_up_to_its_damage(tmp_path: Path) -> None:
    path = write_records(tmp_path, [replace(RECORD, time=float(at)) for at in range(3)], 1.0, "w")
    path.write_bytes(path.read_bytes()[:-20])
    *whole, last = read_records(path)
    assert [record.time for record in whole] == [0.0, 1.0] and isinstance(last, RowError)  # type: ignore[union-attr]
    assert last.row == 3 and last.message == f"{path.name}: row 3: is cut off"
    good = json.loads(path.read_text("utf-8").splitlines()[0])
    path.write_text("\n".join(json.dumps(row) for row in (
        good, [1], {**good, "prompt_ids": "no"}, {**good, "prompt_ids": []}, {**good, "api_key": "x"},
        {name: value for name, value in good.items() if name != "base"}, {**good, "schema_version": 9})) + "\n", "utf-8")
    messages = [found.message for found in read_records(path) if isinstance(found, RowError)]
    assert [message.partition(": row ")[2][:22] for message in messages] == [
        "2: is no JSON object", "3: prompt_ids: is no l", "4: prompt_ids or respo", "5: api_key: is no fiel",
        "6: base: is missing", "7: schema_version: 9 i"]


def test_a_hook_changes_and_drops(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, redact=f"{HOOKS}:without_ones")
    for record in (RECORD, replace(RECORD, prompt_ids=(5,))):
        recorded.it.offer(record)
    recorded.it.close()
    assert kept(tmp_path) == [replace(RECORD, response_ids=(8, 9), settings={"redacted": True})]
    assert recorded.fates == {"redacted": 1, "written": 1}
    plain = Recorded(tmp_path / "other", redact=f"{HOOKS}:as_it_is")
    plain.it.offer(RECORD)
    plain.it.close()
    assert kept(tmp_path / "other") == [RECORD] and not kept(tmp_path)[0].from_the_base


@pytest.mark.parametrize("hook", [f"{HOOKS}:raises", f"{HOOKS}:something_else", "no_such_module_here:f"])
def test_what_cannot_be_redacted_is_not_written(tmp_path: Path, hook: str, caplog: pytest.LogCaptureFixture) -> None:
    recorded = Recorded(tmp_path, redact=hook, rows_per_file=1)
    for _ in range(3):
        recorded.it.offer(RECORD)
    recorded.it.close()
    assert recorded.fates == {"redact_failed": 3} and record_parts(tmp_path) == []
    assert len(caplog.records) == 1 and "<3,4>" not in caplog.text  # what the hook was to take away


@pytest.mark.parametrize(("hook", "why"), [
    ("no_such_module_here:f", r"serve\.record\.redact=no_such_module_here:f: cannot be used \(No module named"),
    (f"{HOOKS}:missing", r"cannot be used \(module .* has no attribute 'missing'\)"), (f"{HOOKS}:NO_FUNCTION", "is no function")])
def test_a_hook_that_is_none_is_told_before_anything_is_served(hook: str, why: str, storage: Path) -> None:
    config = load_config(None, {"storage": str(storage), "serve.record.share": 0.5, "serve.record.redact": hook})
    with pytest.raises(InputError, match=why):
        Recording.of(config)


def test_settings_of_recording(storage: Path) -> None:
    config = load_config(None, {"storage": str(storage), "serve.record.share": 0.5, "serve.app_name": "mine"})
    recording = Recording.of(config)
    assert recording is not None and recording.folder == served_folder(config) == str(storage / "served" / "mine")
    assert Recording.of(load_config(None, {"storage": str(storage)})) is None
    with pytest.raises(InputError, match=r"serve\.record\.folder: must be an absolute path or a URI"):
        load_config(None, {"serve.record.folder": "here"})
    with pytest.raises(InputError, match=r"serve\.record\.redact"):
        load_config(None, {"serve.record.redact": "os.system('x')"})


def test_what_a_record_holds(tmp_path: Path) -> None:
    result = Result("r", (3, 4), (7, 8, 9), "stop", steps=2)
    made = record_of(Generation("g", 9, temperature=0.7, seed=5, top_p=0.9, stop=("secret",)), result, [1, 0],
                     ("tiny@00:fp32", "plain", 4))
    assert (made.prompt_ids, made.response_ids, made.accepted, made.version) == ((3, 4), (7, 8, 9), (1, 0), 4)
    assert made.settings == {"top_p": 0.9} and not made.from_the_base and "secret" not in str(made)
    assert record_of(Generation("g", 9, temperature=1.0), result, [], ("b", "h", None)).from_the_base
    lossy = record_of(Generation("g", 9, speculative="lossy-typical"), result, [], ("b", "h", None))
    assert not lossy.from_the_base
    recorded = Recorded(tmp_path, share=0.3)
    chosen = sum(recorded.it.wants(Generation(f"cmpl-{number}", 9)) for number in range(1000))
    assert 230 < chosen < 370 and recorded.it.wants(Generation("x", 1)) == recorded.it.wants(Generation("x", 1))
