"""The report of a `batch` run: throughput, acceptance of drafts, and errors by kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipelines.batch.writer import OutputTotals


def report(rows: OutputTotals, errors: OutputTotals, before: OutputTotals, skipped: int, seconds: float,
           label: str) -> dict[str, Any]:
    """Figures of the whole output. Throughput counts the rows that this run answered, without `before`, those of earlier runs.

    `acceptance`: share of drafts that were accepted; `tokens_per_step` excludes the first token of an answer, which comes from
    the prefill. None where an endpoint does not report them, or where nothing was left to do. `latency_*`: seconds.
    """
    tokens, fresh = rows.tokens - before.tokens, len(rows.ids) - len(before.ids)
    figures: dict[str, Any] = {
        "rows": len(rows.ids), "errors": len(errors.ids), "rows_skipped": skipped, "resumed": len(before.ids), "tokens": tokens,
        "seconds": round(seconds, 2), "rows_per_second": round(fresh / seconds, 3) if fresh else None,
        "tokens_per_second": round(tokens / seconds, 2) if fresh else None,
        "tokens_per_step": round(rows.later_tokens / rows.steps, 3) if rows.steps else None,
        "acceptance": round(rows.accepted / rows.drafted, 4) if rows.drafted else None, "model": label}
    if rows.latencies:
        figures |= {f"latency_p{share}": round(float(np.percentile(rows.latencies, share)), 3) for share in (50, 99)}
    return figures | {f"errors_{kind}": count for kind, count in sorted(errors.kinds.items())}
