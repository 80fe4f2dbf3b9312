"""Prompt rows from a user's file or data set: with the chat template applied, without duplicates, and split.

`prompts/` appears whole, in parts; the driver sees none of their rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra_core.errors import InputError
from hydra_core.storage import as_path, is_remote, name_in
from pipelines.config import PromptsSection, RunConfig
from pipelines.distill.file_prompts import SOURCE, PromptReader, Templater, TemplateSettings, prompt_rows
from pipelines.distill.tasks import PartWriter
from pipelines.rows.parquet_parts import iter_parts, number_of_rows, part_files
from pipelines.rows.prompt_reader import prompt_files
from pipelines.rows.schemas import ERRORS, PROMPTS, check_counts, content_id
from pipelines.runtime.artifacts import RunPaths, input_digest
from pipelines.runtime.console import Progress
from pipelines.runtime.files import atomic_folder, remove_file, remove_tree, write_text
from pipelines.runtime.ray_cluster import environment_options
from pipelines.runtime.row_flow import Pool, run_flow

COUNTS = "prompts.json"
TASKS = 4
"""That apply the template, at least: they are short."""


def source_digest(section: PromptsSection) -> str | None:
    """Digest of the files that the prompts are read from; None if there is no file that stays (self-made prompts, a hub id,
    records of an endpoint).

    Raises InputError for a file that does not exist.
    """
    if section.path is None or section.source == "served":  # records come and go: what was read first stays
        return None
    path = Path(section.path) if section.source == "datasets" and not is_remote(section.path) else as_path(section.path)
    if not path.exists():
        if section.source == "datasets":
            return None
        raise InputError(f"prompts.path={path}: no such file")
    every = section.source == "datasets" and path.is_dir()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if every else prompt_files(path)
    return content_id(*([name_in(file, path), input_digest("prompts.path", file)] for file in files))


def written_prompts(folder: Path) -> dict[str, int] | None:
    """Counts of the prompts if these and their error rows are complete, else None."""
    if not part_files(folder / "prompts") or not (folder / COUNTS).exists():
        return None
    counts: dict[str, int] = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
    found = number_of_rows(folder / "prompts", PROMPTS), number_of_rows(folder / "errors" / "prompts", ERRORS)
    return counts if found == (counts["prompts"], counts["prompt_errors"]) else None


def write_counts(folder: Path, prompts: int, errors: int, skipped: int, self_made: int = 0) -> dict[str, int]:
    """`self_made`: number of prompts that the base wrote in addition to those of a file."""
    counts = {"prompts": prompts, "prompt_errors": errors, "prompts_skipped": skipped, "self_made": self_made}
    write_text(folder / COUNTS, json.dumps(counts))
    return counts


def check_prompts(config: RunConfig, folder: Path) -> None:
    """Raise InputError for a file that is missing, empty or never has the field, unless its prompts are written already: before
    Ray is started. Reads up to the first usable row."""
    if written_prompts(folder) is None and config.prompts.source != "datasets":
        next(prompt_rows(config.prompts), None)


def read_prompts(config: RunConfig, folder: Path) -> None:
    """Read the user's prompts in tasks of Ray unless they are written already.

    Raises InputError, and writes nothing, for a file that cannot be read or has no usable row, and for too many bad rows.
    """
    if written_prompts(folder) is not None:
        return
    remove_tree(folder / "errors" / "prompts")
    try:
        with _whole(folder / "prompts") as prompts:
            counts = _read(config, prompts, folder)
        write_counts(folder, *counts)
    except BaseException:
        remove_tree(folder / "errors" / "prompts")
        raise


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Where tasks on any node write parts of `folder`. It appears with the end of the block, on an object store with the counts
    that are written then; parts of a run that was killed go."""
    if not is_remote(folder):
        with atomic_folder(folder) as temporary:
            yield temporary
        return
    remove_file(folder.parent / COUNTS)
    remove_tree(folder)
    try:
        yield folder
    except BaseException:
        remove_tree(folder)
        raise


def _read(config: RunConfig, prompts: Path, folder: Path) -> tuple[int, int, int]:
    """Write prompts and error rows of the file; returns how many, and how many duplicates are left out."""
    path, distill = str(config.prompts.path), config.distill
    settings = TemplateSettings(config.base, str(RunPaths.of(config).cache), path, distill.held_out)
    pool = Pool(distill.workers.model_copy(update={"gpus": 0}), 1, max(TASKS, distill.workers.count),
                environment_options(config), lasting=False)
    with Progress("distill", "prompts read") as progress:
        counts = run_flow(SOURCE, PromptReader(config.prompts), Templater, settings,
                          PartWriter(folder, {"prompts": prompts}), pool=pool, storage=folder, here=True,
                          done=lambda found: progress.advance(found.get("prompts", 0)))
    ok, bad, skipped = (counts[name] for name in ("prompts", "errors/prompts", "skipped"))
    first = _first_error(folder / "errors" / "prompts") if bad else ""
    if not ok:
        raise InputError(f"prompts.path={path}: has no usable prompt{f': {first}' if first else ''}")
    hint = f"{first}; mend the file or raise distill.max_error_share" if bad else ""
    check_counts(f"prompts.path={path}", counts["read"], ok, bad, skipped, distill.max_error_share, hint)
    return ok, bad, skipped


def _first_error(folder: Path) -> str:
    """The message of the first bad row of the file."""
    found = (min((int(row["id"].rpartition(":")[2]), row["message"]) for row in rows.to_pylist())
             for _, rows in iter_parts(folder, ERRORS, ["id", "message"]))
    return str(min(found)[1])
