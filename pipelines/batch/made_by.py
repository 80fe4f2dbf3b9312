"""What made the answers: every answer says it, and one output holds the answers of one model.

Our own answers carry `ModelDigest.fingerprint`: the base must be the one that was found at the start; other heads on it give
the same answers. Endpoints of other kinds are held to the `model` and `system_fingerprint` of their first answer to this output.
"""

from __future__ import annotations

import json
import threading
from collections import Counter

from hydra_core.errors import StoppedError
from hydra_core.storage import as_path
from pipelines.runtime.files import write_text
from pipelines.serve.model_identity import base_part


class MadeBy:
    """Checks each answer; many threads call it at once. `where`: the backend in messages; the others as in `RequestSettings`."""

    def __init__(self, where: str, serves: str | None, kept: str | None = None, any_model: bool = False) -> None:
        self.where, self.serves, self.any_model = where, serves, any_model
        self.kept = as_path(kept) if kept else None
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._first: dict[str, list[str | None]] = {}
        if self.kept is not None and self.kept.exists():
            self._first = json.loads(self.kept.read_text(encoding="utf-8"))

    def __str__(self) -> str:
        return ", ".join(sorted(self.seen))

    def check(self, fingerprint: str | None, asked: str, model: str | None = None) -> None:
        """Count an answer to a request for the model `asked` that says it was made by `model` and `fingerprint`.

        Raises StoppedError where that is another model than this output's.
        """
        with self._lock:
            if self.serves is not None:
                if base_part(fingerprint) != base_part(self.serves):
                    raise StoppedError(f"{self.where}: answers with another model now ({fingerprint or 'no fingerprint'}; the "
                                       f"job began with {self.serves}): the answer is not written. Start the same base there "
                                       "again and run again, or choose another batch.output")
                self.seen[str(fingerprint)] += 1
                return
            if not self.any_model:
                self._check_foreign(asked, [model, fingerprint])
            self.seen[f"{model or asked} {fingerprint or ''}".strip()] += 1

    def _check_foreign(self, asked: str, found: list[str | None]) -> None:
        if asked not in self._first:
            self._first[asked] = found
            if self.kept is not None:
                write_text(self.kept, json.dumps(self._first))
        if (first := self._first[asked]) != found:
            now, then = (" ".join(part or "-" for part in one) for one in (found, first))
            raise StoppedError(f"{self.where}: asked for {asked}, answers as {now} now, and its first answer came from {then}: "
                               "the answer is not written. Choose another batch.output, or set batch.any_model=true if both "
                               "may answer")
