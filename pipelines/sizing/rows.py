"""How many rows and tokens a run has: from a finished `distill`, else from the settings and the file of prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_core.storage import is_remote
from pipelines.config import RunConfig
from pipelines.runtime.artifacts import RunPaths, read_manifest
from pipelines.runtime.dry_run import SELF_MADE
from pipelines.sizing.amounts import Range

ANSWER_SHARE = 0.3
"""Least mean length of answers, as a share of the limit, that an estimate reckons with."""
PROMPT_SHARE = 0.15
"""The same of self-made prompts."""
TEMPLATE_TOKENS = Range(8, 48)
"""What a chat template adds to a prompt."""
BYTES_A_TOKEN = (2.5, 5.0)
"""Of text in the file of prompts."""
SAMPLE_BYTES = 4 << 20
"""Of a file of prompts that are read to learn its lines' length."""


@dataclass(frozen=True)
class RowCounts:
    """`prompts` and `answers`: rows; `prompt_tokens`, `answer_tokens`: of all answers; `note`: where that comes from."""

    prompts: Range
    answers: Range
    prompt_tokens: Range
    answer_tokens: Range
    note: str = ""

    @property
    def tokens(self) -> Range:
        """Prompt and answer of every answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def longest(self) -> float:
        """Mean tokens of an answer with its prompt, at most."""
        return self.tokens.high / max(self.answers.high, 1)


def planned_rows(config: RunConfig) -> RowCounts:
    """What `distill` will make."""
    prompts, distill = config.prompts, config.distill
    answers_each = len(distill.temperatures)
    made = Range(PROMPT_SHARE * prompts.max_tokens, prompts.max_tokens) + TEMPLATE_TOKENS
    note, total = "", Range.of(0)
    if prompts.source == "self":
        count, length = Range.of(prompts.count or SELF_MADE), made
    else:
        count, length, note = _of_file(config)
        both = count.high + prompts.self_made
        share = prompts.self_made / both if both else 0.0
        count, length = count + Range.of(prompts.self_made), length * (1 - share) + made * share
    answers = count * answers_each
    total = Range(ANSWER_SHARE * distill.max_new_tokens, distill.max_new_tokens)
    return RowCounts(count, answers, answers.times(length), answers.times(total), note)


def finished_rows(config: RunConfig) -> RowCounts | None:
    """What a finished `distill` has made, None where it has not finished."""
    manifest = read_manifest(RunPaths.of(config).stage("distill")) if not is_remote(config.storage) else None
    figures: dict[str, Any] = manifest["result"]["figures"] if manifest else {}
    if not {"responses", "response_tokens", "feature_tokens", "feature_rows"} <= figures.keys():
        return None
    answers, tokens = figures["responses"], figures["response_tokens"]
    whole = figures["feature_tokens"] * answers / max(figures["feature_rows"], 1)
    return RowCounts(Range.of(figures.get("prompts", answers)), Range.of(answers), Range.of(max(whole - tokens, 0)),
                     Range.of(tokens), "counted by the finished distill")


def _of_file(config: RunConfig) -> tuple[Range, Range, str]:
    """Rows of the file or data set of prompts, tokens of one, and a note."""
    prompts = config.prompts
    count, bytes_each = (None, None)
    if prompts.source not in ("datasets", "served"):
        count, bytes_each = rows_of(Path(prompts.path or ""))
    length = Range(PROMPT_SHARE * prompts.max_tokens, 4 * prompts.max_tokens)
    if bytes_each is not None:
        length = Range(bytes_each / BYTES_A_TOKEN[1], bytes_each / BYTES_A_TOKEN[0])
    rows = prompts.count if count is None else min(count, prompts.count or count)
    if rows is None:
        return Range.of(1000), length + TEMPLATE_TOKENS, "the number of prompts is not known: all that follows is for 1,000"
    return Range.of(rows), length + TEMPLATE_TOKENS, "" if bytes_each else "the length of prompts is not known"


def rows_of(path: Path) -> tuple[int | None, float | None]:
    """Rows of a file of prompts, and mean bytes of their text, which Parquet does not tell; None for what is not known."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    if not files:
        return lines_of(path)
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return sum(parquet.read_metadata(file).num_rows for file in files), None
    except (OSError, pyarrow.ArrowException):
        return None, None


def lines_of(path: Path) -> tuple[int | None, float | None]:
    """Rows of a JSONL file, exact where it is short, and mean bytes of their text; None for what cannot be read."""
    try:
        with path.open("rb") as file:
            sample = file.read(SAMPLE_BYTES)
        size = path.stat().st_size
    except OSError:
        return None, None
    lines = [line for line in sample.splitlines() if line.strip()]
    if not lines:
        return None, None
    text = sum(len(line) for line in lines) / len(lines)
    try:
        overhead = len(lines[0]) - len(max(_texts(json.loads(lines[0])), key=len))
    except ValueError:
        overhead = 0
    rows = len(lines) if size <= len(sample) else round(size * len(lines) / len(sample))
    return rows, max(text - max(overhead, 0), 1)


def _texts(value: Any) -> list[str]:
    """All texts in a JSON value, the empty one too."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ["", *(text for one in inner for text in _texts(one))]
