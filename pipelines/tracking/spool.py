"""What MLflow does not take now is kept in a folder of the run's storage, and sent in the same order when it answers again.

    STORAGE/runs/NAME/unsent/TIME-RUN_ID/server          the address of the store that it is for, without credentials
    STORAGE/runs/NAME/unsent/TIME-RUN_ID/records.jsonl   a record a line: metrics, parameters, tags, data sets, artifacts, the end
    STORAGE/runs/NAME/unsent/TIME-RUN_ID/files/7/...     the artifact of record 7
    STORAGE/runs/NAME/unsent/TIME-RUN_ID/sent            how many records MLflow has

Each process writes to a folder of its own, whose lock it holds. What it could not send until its end the next command of the same
run sends. A record that is sent twice, after a kill in between, is there once (`records`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from hydra_core.errors import InputError, StoppedError
from hydra_core.storage import as_path, is_remote, listing, local_copy
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths
from pipelines.runtime.console import say
from pipelines.runtime.faults import first_line
from pipelines.runtime.files import append_line, copy_file, copy_folder, remove_tree, write_text
from pipelines.runtime.lock import only_run
from pipelines.runtime.provenance import without_credentials
from pipelines.tracking.client import AwayError, MlflowClient, MlflowException, open_client, why_dead
from pipelines.tracking.records import Record, send_record

FOLDER, SERVER, RECORDS, FILES, SENT = "unsent", "server", "records.jsonl", "files", "sent"
SEND_SECONDS = 5.0
"""Between two tries to send what is kept."""
LAST_SECONDS = 60.0
"""Longest wait, at the end, for a try that is under way."""


def unsent_folder(config: RunConfig) -> Path:
    """The folder of what a run's commands could not send."""
    return RunPaths.of(config).run / FOLDER


def send_unsent(config: RunConfig, uri: str, client: MlflowClient) -> None:
    """Send what earlier commands of this run have kept for the store at `uri`, oldest first. What cannot be sent stays, and is
    told in a line."""
    _send_kept(unsent_folder(config), as_path(config.storage), uri, client)


class Spool:
    """Sends the records of one run, and keeps those that MLflow does not take now. Any thread may `put`.

    `client`: None where none could be opened; `folder`: `unsent_folder`; `storage`: above which no folder is removed.
    """

    def __init__(self, uri: str, client: MlflowClient | None, run_id: str, folder: Path, storage: Path) -> None:
        self._uri, self._client, self._run_id = uri, client, run_id
        self._root, self._storage = folder, storage
        self._folder: Path | None = None
        self._count, self._why, self._hopeless = 0, "", False
        self._guard, self._sending = threading.Lock(), threading.Lock()
        self._ended, self._held = threading.Event(), ExitStack()
        self._thread: threading.Thread | None = None

    def put(self, record: Record, source: Path | None = None) -> None:
        """Send a record, or keep it. `source`: the file or folder of an artifact.

        Raises StoppedError for a run that was deleted, InputError for a store that refuses the record.
        """
        with self._guard:
            if self._folder is None:
                try:
                    if self._client is None:
                        self._client = open_client(self._uri)
                    return send_record(self._client, self._run_id, record, source)
                except AwayError as error:
                    self._begin(error)
            self._keep(record, source)

    def send(self) -> bool:
        """Try to send all that is kept; whether nothing is left. A store that does not take it raises nothing."""
        with self._sending:
            if self._folder is None:
                return True
            try:
                if (dead := why_dead(self._uri)) is not None:
                    self._why = f"tracking.uri={without_credentials(self._uri)}: does not answer ({dead})"
                    return False
                self._client = self._client or open_client(self._uri)
                while True:
                    _send_records(self._folder, self._client)
                    with self._guard:
                        if _sent(self._folder) == self._count:  # else a record came meanwhile
                            self._finish()
                            return True
            except (InputError, StoppedError, MlflowException) as error:
                self._why = _reason(error)
                self._hopeless = isinstance(error, InputError | StoppedError) and not isinstance(error, AwayError)
                return False

    def close(self) -> None:
        """Send what is left, or say where it lies and who sends it."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)
        trying = self._thread is not None and self._thread.is_alive()
        if (folder := self._folder) is not None and (trying or not self.send()):
            say("tracking", f"{self._why}: {self._count - _sent(folder)} records of run {self._run_id} are kept in {folder}: the "
                "next command of this run sends them")
        elif self._client is not None:
            _send_kept(self._root, self._storage, self._uri, self._client, self._run_id)  # of the run's workers
        self._held.close()

    def _begin(self, error: AwayError) -> None:
        folder = self._root / f"{round(1000 * time.time()):013d}-{self._run_id}"
        self._held.enter_context(only_run(folder, self._storage))
        write_text(folder / SERVER, without_credentials(self._uri))
        self._folder, self._count = folder, 0
        self._why = _reason(error)
        say("tracking", f"{self._why}: the work goes on, and what it would log is kept in {folder}")
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._send_until_done, name="send-unsent", daemon=True)
            self._thread.start()

    def _keep(self, record: Record, source: Path | None) -> None:
        assert self._folder is not None
        if source is not None:
            copy: Callable[[Path, Path], None] = copy_folder if source.is_dir() else copy_file
            copy(source, self._folder / FILES / str(self._count) / source.name)
            record = {**record, "source": source.name}
        append_line(self._folder / RECORDS, json.dumps(record).encode())
        self._count += 1

    def _finish(self) -> None:
        assert self._folder is not None
        say("tracking", f"MLflow answers again: {self._count} records were sent")
        remove_tree(self._folder)
        self._folder = None
        self._held.close()

    def _send_until_done(self) -> None:
        while not self._ended.wait(SEND_SECONDS) and not self.send() and not self._hopeless:
            pass


def _reason(error: Exception) -> str:
    """The line of an error without its advice: here nobody has to do anything."""
    return first_line(error).partition(": run the same command again")[0]


def _send_kept(root: Path, storage: Path, uri: str, client: MlflowClient, run_id: str = "") -> None:
    """Send what ended processes have kept for the store at `uri`; `run_id`: of this run alone."""
    for folder in _folders(root):
        try:
            with only_run(folder, storage):
                if not _is_for(folder, uri, run_id):
                    continue
                count = _send_records(folder, client)
                remove_tree(folder)
            say("tracking", f"{count} records that were kept in {folder} are in MLflow now")
        except (InputError, StoppedError, MlflowException) as error:
            if "another run writes to it" not in str(error):  # one that runs still sends its own
                say("tracking", f"{folder}: what is kept there cannot be sent ({first_line(error)}): the next command of this "
                    "run tries again; delete the folder to give it up")


def _is_for(folder: Path, uri: str, run_id: str) -> bool:
    """Whether it is kept for that store and run; False where another command has sent it in between."""
    server = folder / SERVER
    return folder.name.endswith(run_id) and server.exists() and server.read_text("utf-8") == without_credentials(uri)


def _folders(root: Path) -> list[Path]:
    """Those with records, the oldest first."""
    if is_remote(root):
        return [root / name for name in sorted({name.split("/")[0] for name in listing(root) if name.endswith(f"/{RECORDS}")})]
    return sorted(path.parent for path in root.glob(f"*/{RECORDS}"))


def _send_records(folder: Path, client: MlflowClient) -> int:
    """Send the records that are not sent yet, in their order; returns how many there are. Half a line, of a record that is being
    written or was when its process was killed, is none."""
    run_id, sent = folder.name.partition("-")[2], _sent(folder)
    lines = (folder / RECORDS).read_text(encoding="utf-8").split("\n")[:-1] if (folder / RECORDS).exists() else []
    for number, line in enumerate(lines[sent:], start=sent):
        record = json.loads(line)
        source = local_copy(folder / FILES / str(number) / record["source"]) if "source" in record else None
        send_record(client, run_id, record, source)
        write_text(folder / SENT, str(number + 1))
    return len(lines)


def _sent(folder: Path) -> int:
    return int((folder / SENT).read_text(encoding="utf-8")) if (folder / SENT).exists() else 0
