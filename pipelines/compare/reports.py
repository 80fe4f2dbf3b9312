"""The reports that stages leave among the artifacts of their runs."""

from __future__ import annotations

import json
from typing import Any

from pipelines.tracking import RunReader, RunRecord


def report_of(reader: RunReader, run: RunRecord) -> dict[str, Any]:
    """The `report.json` of a run, empty where there is none that can be read."""
    try:
        found = json.loads(reader.text(run.run_id, "report.json") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
